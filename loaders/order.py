"""Which samples come when: the composition of each global batch, and a rank's part of it.

The global order is a function of (seed, epoch) and the sample numbers. Every backend reads this
file, so all of them deliver the same batches; only the cut by rank knows about ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.kernels import keyed
from letheon.loaders.batch import Reads, Stream

MIXED = 64  # blocks whose samples are shuffled among each other, where there are blocks


class Part(NamedTuple):
    """One rank's part of one global batch."""

    samples: NDArray[np.int64]  # (b,) numbers in the image set
    turn: NDArray[np.int64]  # (b,) how often the sample has come before in this epoch
    total: int  # samples of the global batch


def sizes(n: int, batch_size: int) -> list[int]:
    """Global batch sizes for n samples: full batches, then a rest of at least half a batch.

    Where the rest is smaller than half a batch, the last two batches share what is left evenly,
    so no step is taken on a handful of samples.
    """
    full, rest = divmod(n, batch_size)
    if rest == 0:
        return [batch_size] * full
    if full == 0 or 2 * rest >= batch_size:
        return [batch_size] * full + [rest]
    left = batch_size + rest
    return [batch_size] * (full - 1) + [left - left // 2, left // 2]


def share(count: int, rank: int, world: int) -> slice:
    """The rows of a global batch of `count` that belong to `rank`: contiguous, none twice."""
    return slice(rank * count // world, (rank + 1) * count // world)


def sweep_rounds(count: int, batch_size: int, world: int) -> int:
    """Count the batches of a sweep over `count` samples on the rank that has the most of them."""
    most, step = (math.ceil(size / world) for size in (count, batch_size))
    return math.ceil(most / step)


def stream_sizes(stream: Stream | Reads, forget: NDArray[np.bool_], batch_size: int) -> list[int]:
    """Global batch sizes of one epoch; for ``paired`` those of the retain half.

    `batch_size` is for a stream that names none. A batch may have fewer samples than there are
    ranks: some then have an empty part of it.

    Raises:
        InputError: The stream is empty, or as `Stream.of`.
    """
    stream = Stream.of(stream)
    reads, batch_size = stream.reads, stream.batch_size or batch_size
    chosen = int(forget.sum())
    kept = len(forget) - chosen
    mixed = chosen + _count(kept, stream.retain_share)
    n = {"forget": chosen, "retain": kept, "mixed": mixed, "paired": kept}[reads]
    if n == 0 or (reads == "paired" and chosen == 0):
        raise InputError(
            f"got {chosen} forget and {kept} retain samples, expected at least one of each kind "
            f"that a '{reads}' phase reads; change the forget request"
        )
    parts = sizes(n, batch_size)
    if stream.steps is not None:
        return (parts * -(-stream.steps // len(parts)))[: stream.steps]
    return parts[: _count(len(parts), stream.share)]


def _count(n: int, part: float) -> int:
    """The whole number that is at least this part of n; rounded first: 0.07 * 100 is over 7."""
    return math.ceil(round(part * n, 9))


def _sample(retain: NDArray[np.int64], part: float, seed: int) -> NDArray[np.int64]:
    """This part of the retain samples, by keyed numbers: the same ones in every epoch."""
    keys = keyed.hash_keys(seed, "retain-share", 0, torch.from_numpy(retain), 1)[:, 0]
    return np.sort(retain[torch.argsort(keys, stable=True).numpy()[: _count(len(retain), part)]])


def _shuffle(
    indices: NDArray[np.int64], seed: int, epoch: int, block: int, n: int
) -> NDArray[np.int64]:
    """`indices` by the keyed number of each sample: leaving samples out keeps the others' order.

    With blocks of neighbours, those of the n samples of the set come in a keyed order, and the
    samples of each `MIXED` of them are shuffled among each other.
    """
    keys = keyed.hash_keys(seed, "order", epoch, torch.from_numpy(indices), 1)[:, 0]
    if not block:
        return indices[torch.argsort(keys, stable=True).numpy()]
    place = np.empty(-(-n // block), np.int64)
    place[keyed.permutation(seed, "blocks", epoch, len(place)).numpy()] = np.arange(len(place))
    return indices[np.lexsort((keys.numpy(), place[indices // block] // MIXED))]


def turn_epoch(epoch: int, turn: int) -> int:
    """The number that stands for the epoch in keyed draws at the given turn; turn 0 is `epoch`."""
    return epoch + (turn << 32)


def epoch_parts(
    stream: Stream | Reads,
    forget: NDArray[np.bool_],
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    block: int = 0,
) -> list[Part]:
    """This rank's parts of all the global batches of one epoch.

    A `block` is so many samples with neighbouring numbers, which lie together on the disk; an epoch
    then reads `MIXED` blocks at a time, on all ranks together. 0 is a full shuffle.

    A stream of more steps than its epoch has begins anew, turn after turn, each in a new order.
    For ``paired`` a part is the rank's share of the retain half followed by its share of the
    forget half. The forget half runs through the forget set in turns of its own, and starts anew
    with the epoch.

    Raises:
        InputError: As `stream_sizes`.
    """
    stream = Stream.of(stream)
    counts = stream_sizes(stream, forget, batch_size)
    n, needed = len(forget), sum(counts)

    def cycle(members: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`members` in as many turns as are needed: the samples, and the turn of each."""
        turns = range(-(-needed // len(members)))
        orders = [_shuffle(members, seed, turn_epoch(epoch, t), block, n) for t in turns]
        return np.concatenate(orders), np.repeat(np.arange(len(turns)), len(members))

    everyone = np.arange(n)
    main = {"forget": forget, "mixed": np.ones_like(forget)}.get(stream.reads, ~forget)
    members = everyone[main]
    if stream.reads == "mixed" and stream.retain_share < 1:
        part = _sample(everyone[~forget], stream.retain_share, seed)
        members = np.sort(np.concatenate([everyone[forget], part]))
    halves = [cycle(members)]
    if stream.reads == "paired":
        halves.append(cycle(everyone[forget]))
    parts: list[Part] = []
    start = 0
    for count in counts:
        mine = share(count, rank, world)
        rows = slice(start + mine.start, start + mine.stop)
        samples, turn = (np.concatenate([half[k][rows] for half in halves]) for k in (0, 1))
        parts.append(Part(samples, turn, count * len(halves)))
        start += count
    return parts


def audit(reads: Reads, flags: NDArray[np.bool_]) -> None:
    """Check one part's forget flags, looked up by index, against the phase that reads it.

    Raises:
        RuntimeError: A forget sample in a retain-only place or the reverse: a fault of ours.
    """
    half = len(flags) // 2
    right = {
        "mixed": True,
        "retain": not flags.any(),
        "forget": flags.all(),
        "paired": not flags[:half].any() and flags[half:].all(),
    }[reads]
    if not right:
        raise RuntimeError(f"the '{reads}' stream mixed up forget and retain samples")
