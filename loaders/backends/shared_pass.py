"""One decoded pass over an image set that feeds several streams.

A sample's image is a function of (seed, epoch, turn, sample), whichever batch it is in. So streams
of one seed and epoch share it, whatever they read and in batches of whatever size: each image is
made once and waits until the last stream has had it, as far as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.loaders.backends.base import Backend
from letheon.loaders.backends.memory import free_bytes, to_device
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Batch, Loader, Reads, Stream
from letheon.loaders.order import Part
from letheon.loaders.preset import Preset
from letheon.loaders.views import unwrap

SHARE = 0.25  # of the free memory that images may wait in


class Serving(NamedTuple):
    """One batch to hand over, and where its rows come from."""

    stream: int
    part: Part
    # Of each chunk: its number, the rows wanted of it, and the rows they become.
    pieces: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]


class Plan(NamedTuple):
    """What is decoded and what is handed over, both in order."""

    chunks: list[Part]
    servings: list[Serving]


def source(loader: Loader, stream: Stream | Reads) -> Hashable:
    """Equal for streams of loaders that may share a pass; None for one that cannot share."""
    if not isinstance(loader, Backend) or not loader.shares_pass:
        return None
    images, numbers = unwrap(loader.images)
    return (
        type(loader), id(images), numbers.tobytes(), loader.images.labels.tobytes(),
        loader.forget.tobytes(),
        loader.preset.with_size(Stream.of(stream).image_size), loader.seed, loader.block,
    )  # fmt: skip


def shared_pass(
    loaders: Sequence[Loader],
    streams: Sequence[Stream | Reads],
    epoch: int,
    skips: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """Feed readers of one epoch, each with its own batch size and stream, from one pass.

    Args:
        loaders: one for each reader.
        streams: what each reads; all of one `source`.
        epoch: counted from 0.
        skips: batches that each reader had before it was stopped, which it does not get again.

    Yields:
        (the numbers of the readers, their next batch): whoever reads the same stream in the same
        batches gets the very same `Batch`, which nobody may change. Each reader gets in all what
        `loader.train` would have given it; the order of the handing over is equal on every rank.
    """
    readers: dict[tuple[Stream, int], list[int]] = {}
    backends: list[Backend] = []
    for k, (loader, one) in enumerate(zip(loaders, streams, strict=True)):
        assert isinstance(loader, Backend)
        stream = Stream.of(one)
        size = stream.batch_size or loader.batch_size
        skip = skips[k] if skips is not None else 0
        readers.setdefault((stream._replace(batch_size=size), skip), []).append(k)
        backends.append(loader)
    first, numbers = backends[0], list(readers.values())
    preset = first.preset.with_size(next(iter(readers))[0].image_size)
    parts = [first.parts(stream, epoch)[skip:] for stream, skip in readers]
    if not any(parts):
        return
    batches = serve(
        plan_pass(parts, _room(first, preset)),
        lambda parts: first.make_batches(parts, epoch, preset),
        lambda part: first.empty_batch(part, preset),
    )
    for k, batch in batches:
        yield numbers[k], batch


def _room(loader: Backend, preset: Preset) -> int:
    """Images that may wait, on the device on which the loader makes them."""
    device = torch.device("cpu") if isinstance(loader, TorchLoader) else loader.device
    image = preset.size**2 * 3 * 4  # float32
    here = loader.world if device.type == "cpu" else 1  # ranks that share this memory, at most
    return int(SHARE * free_bytes(device) / here / image)


def plan_pass(streams: Sequence[Sequence[Part]], room: int) -> Plan:
    """Which samples are decoded when, and what each batch takes from where.

    Args:
        streams: the parts of each stream, in its order.
        room: images kept for later batches beyond the newest chunk; where more would have to wait,
            those that have waited longest are let go, and decoded again for who still wants them.
    """
    ids = _number_samples(streams)  # of each stream, of each part: (b,) which image, counted from 0
    uses = np.bincount(np.concatenate([part for stream in ids for part in stream]))
    home = np.full(len(uses), -1)  # the chunk in which an image waits
    row = np.zeros(len(uses), np.int64)
    chunks: list[Part] = []
    members: list[NDArray[np.int64]] = []  # of each chunk: which images
    wanted: dict[int, int] = {}  # chunk that is kept: how many of its images are still to be used
    servings = []
    for stream, number in _turns(streams):
        part, mine = streams[stream][number], ids[stream][number]
        new = home[mine] < 0
        if new.any():
            fresh = mine[new]
            home[fresh], row[fresh] = len(chunks), np.arange(len(fresh))
            wanted[len(chunks)] = len(fresh)
            members.append(fresh)
            chunks.append(Part(part.samples[new], part.turn[new], len(fresh)))
        places = home[mine]
        pieces = []
        for chunk in np.unique(places).tolist():
            rows = np.flatnonzero(places == chunk)
            pieces.append((chunk, row[mine[rows]], rows))
        servings.append(Serving(stream, part, pieces))
        uses[mine] -= 1
        over, counts = np.unique(places[uses[mine] == 0], return_counts=True)
        for chunk, count in zip(over.tolist(), counts.tolist(), strict=True):
            wanted[chunk] -= count
            if not wanted[chunk]:
                del wanted[chunk]
        waiting = sum(len(members[chunk]) for chunk in wanted)
        for chunk in list(wanted):
            if waiting <= room:
                break
            home[members[chunk][home[members[chunk]] == chunk]] = -1
            waiting -= len(members[chunk])
            del wanted[chunk]
    return Plan(chunks, servings)


def _number_samples(streams: Sequence[Sequence[Part]]) -> list[list[NDArray[np.int64]]]:
    """Every (sample, turn) by a number of its own, shaped as the streams' parts."""
    parts = [part for stream in streams for part in stream]
    most = 1 + max(int(part.samples.max(initial=0)) for part in parts)
    keys = np.concatenate([part.turn * most + part.samples for part in parts])
    numbers = np.unique(keys, return_inverse=True)[1].reshape(-1)
    cut = iter(np.split(numbers, np.cumsum([len(part.samples) for part in parts])[:-1]))
    return [[next(cut) for _ in stream] for stream in streams]


def _turns(streams: Sequence[Sequence[Part]]) -> list[tuple[int, int]]:
    """(stream, number of its batch) in the order of the share of its stream that it completes.

    All streams of a seed and epoch run through their samples in one order, so what one of them
    needs next the others need soon. By global sizes: the same on every rank.
    """
    turns = []
    for stream, parts in enumerate(streams):
        ends = np.cumsum([part.total for part in parts])
        turns += [(int(end) / int(ends[-1]), stream, number) for number, end in enumerate(ends)]
    return [(stream, number) for _, stream, number in sorted(turns)]


def serve(
    plan: Plan,
    make: Callable[[list[Part]], Iterator[Batch]],
    make_empty: Callable[[Part], Batch],
) -> Iterator[tuple[int, Batch]]:
    """(stream, batch) of each serving; a chunk is let go after the last that takes from it."""
    last = {chunk: k for k, turn in enumerate(plan.servings) for chunk, _, _ in turn.pieces}
    source = make(plan.chunks)
    made: dict[int, Batch] = {}
    count = 0
    for k, (stream, part, pieces) in enumerate(plan.servings):
        if not pieces:  # fewer samples in the global batch than ranks
            yield stream, make_empty(part)
            continue
        while count <= max(chunk for chunk, _, _ in pieces):
            made[count] = next(source)
            assert len(made[count].labels) == plan.chunks[count].total  # none was left out
            count += 1
        yield stream, _assemble([(made[chunk], of, to) for chunk, of, to in pieces], part)
        for chunk, _, _ in pieces:
            if last[chunk] == k:
                del made[chunk]


def _assemble(
    pieces: Sequence[tuple[Batch, NDArray[np.int64], NDArray[np.int64]]], part: Part
) -> Batch:
    """The rows of several chunks as one batch; a chunk that is the batch is not copied."""
    chunk, of, _ = pieces[0]
    count = len(part.samples)
    if len(pieces) == 1 and np.array_equal(of, np.arange(len(chunk.labels))):
        return chunk._replace(total=part.total)
    out = []
    for k, like in enumerate(chunk[:4]):
        shape = (count, *like.shape[1:])
        if k == 0:  # channels-last: rows are contiguous as (B, H, W, C)
            shape = (count, *like.shape[2:], like.shape[1])
        pin = like.device.type == "cpu" and like.is_pinned()
        out.append(torch.empty(shape, dtype=like.dtype, device=like.device, pin_memory=pin))
    for chunk, of, to in pieces:
        device = chunk.labels.device
        rows, places = (to_device(torch.from_numpy(numbers), device) for numbers in (of, to))
        pixels = chunk.images.permute(0, 2, 3, 1)
        for target, tensor in zip(out, (pixels, *chunk[1:4]), strict=True):
            target[places] = tensor[rows.to(tensor.device)]
    return Batch(out[0].permute(0, 3, 1, 2), out[1], out[2], out[3], part.total)
