"""The classes of ImageNet-1k: WordNet id and word, in the order of the public models' logits."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def words() -> dict[str, str]:
    """WordNet id -> word; the id's place in this dictionary is its class id, 0 to 999."""
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines())
