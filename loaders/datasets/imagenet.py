"""The classes of ImageNet-1k: WordNet id and word, in the order of the public models' logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path


@cache
def words() -> dict[str, str]:
    """WordNet id -> word; the id's place in this dictionary is its class id, 0 to 999."""
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines())


def find_ids(names: Sequence[str]) -> dict[str, str] | None:
    """The WordNet id of each name, which is an id or ImageNet's word; None unless all are.

    "tench", "great white shark", "tench, Tinca tinca"; the second class of one word, such as the
    machine among the two called crane, is "crane_2" or "crane 2".
    """
    exact: dict[str, list[str]] = {}
    loose: dict[str, list[str]] = {}
    for wnid, word in words().items():
        exact.setdefault(_plain(word), []).append(wnid)
        loose.setdefault(_plain(word).casefold(), []).append(wnid)
    found: dict[str, str] = {}
    for name in names:
        if name in words():
            found[name] = name
            continue
        word, number = _plain(name), 1
        if word not in exact and word[-2:] == " 2":
            word, number = word[:-2], 2
        candidates = exact.get(word) or loose.get(word.casefold(), [])
        if len(candidates) < number or (len(candidates) == 1 and number > 1):
            return None
        found[name] = candidates[number - 1]
    return found if len(set(found.values())) == len(names) else None


def _plain(word: str) -> str:
    return " ".join(word.partition(",")[0].replace("_", " ").replace("-", " ").split())
