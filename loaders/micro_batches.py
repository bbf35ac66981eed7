"""A rank's part of a global batch cut into micro-batches, by rows or by whole groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from letheon.errors import RunFailed
from letheon.loaders.batch import Batch
from letheon.loaders.order import group_bounds, share


def pieces(batch: Batch, count: int) -> Iterator[tuple[Batch, bool]]:
    """The batch in `count` micro-batches, none empty, and whether it is the last.

    Each takes every count-th row, so that the two halves of a ``paired`` batch are in all of them.
    `total` stays that of the whole batch: the losses, weighted by their samples, add up to its own.
    """
    if not len(batch.labels):
        return
    if count == 1:
        yield batch, True
        return
    for first in reversed(range(min(count, len(batch.labels)))):
        yield batch.each(partial(_cut, cuts=[slice(first, None, count)])), first == 0


def group_sizes(count: int, rank: int, world: int, group: int) -> list[int]:
    """Rows of this rank's groups of a global batch of `count`."""
    bounds = group_bounds(count, group)
    mine = share(len(bounds) - 1, rank, world)
    return [stop - start for start, stop in pairwise(bounds[mine.start : mine.stop + 1])]


def group_pieces(
    batch: Batch, count: int, sizes: Sequence[int], halves: int
) -> Iterator[tuple[Batch, tuple[int, ...], bool]]:
    """The batch in at most `count` micro-batches of whole groups, each with the rows of its groups.

    `sizes` are those of the batch's groups, of one half of it where it has two (``paired``).
    """
    rows = sum(sizes)
    if rows * halves != len(batch.labels):
        raise RunFailed(
            f"got {len(batch.labels)} images from the loader; expected {halves * rows}, whole "
            "batch-norm groups; use a loader that shares batches out by `order.share`"
        )
    count = min(count, len(sizes))
    for number in range(count):
        mine = share(len(sizes), number, count)
        start, stop = sum(sizes[: mine.start]), sum(sizes[: mine.stop])
        cuts = [slice(half * rows + start, half * rows + stop) for half in range(halves)]
        piece = batch
        if count > 1:
            piece = batch.each(partial(_cut, cuts=cuts))
        yield piece, tuple(sizes[mine]), number == count - 1


def _cut(tensor: Tensor, cuts: Sequence[slice]) -> Tensor:
    return tensor[cuts[0]] if len(cuts) == 1 else torch.cat([tensor[cut] for cut in cuts])
