"""The split is a fixed function of the number of images, and the shipped files are that split."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch

from letheon.errors import InputError
from letheon.eval.metrics.knn_splits import split


@pytest.mark.parametrize("rule", ["keyed", "legacy"])
@pytest.mark.parametrize("n", [2, 7, 2427])
def test_each_image_is_on_one_side(rule: str, n: int) -> None:
    parts = split(n, rule)  # type: ignore[arg-type]
    assert len(parts.database) == int(0.8 * n)
    both = torch.cat([parts.database, parts.queries])
    assert both.sort().values.tolist() == list(range(n))
    assert torch.equal(parts.queries, parts.queries.sort().values)


def splitmix(x: int) -> int:
    """The finaliser of splitmix64 on unbounded integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_keyed_split_can_be_redrawn_in_plain_integers() -> None:
    golden, n = 0x9E3779B97F4A7C15, 57
    key = splitmix((2 * golden + zlib.crc32(b"knn-split")) % 2**64)
    key = splitmix(key)
    drawn = [splitmix((splitmix((key + i * golden) % 2**64) + golden) % 2**64) for i in range(n)]
    signed = [value - 2**64 if value >= 2**63 else value for value in drawn]
    order = sorted(range(n), key=signed.__getitem__)
    assert split(n).queries.tolist() == sorted(order[int(0.8 * n) :])
    assert split(20).queries.tolist() == [2, 6, 8, 18]  # a change must not pass unseen


SHIPPED = sorted((Path(__file__).parents[2] / "eval" / "metrics" / "split_files").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_the_split_of_their_size(path: Path) -> None:
    content = json.loads(path.read_text())
    assert split(content["n"]).queries.tolist() == content["queries"]


def test_office_home_and_cub_are_shipped() -> None:
    assert len(SHIPPED) == 5


def test_legacy_split_is_torchs_random_split() -> None:
    data = list(range(101))
    drawn = torch.utils.data.random_split(
        data, [int(0.8 * 101), 101 - int(0.8 * 101)], torch.Generator().manual_seed(2)
    )
    parts = split(101, "legacy")
    assert parts.queries.tolist() == sorted(drawn[1].indices)


def test_a_set_of_one_cannot_be_split() -> None:
    with pytest.raises(InputError, match="got a set of 1 images"):
        split(1)
