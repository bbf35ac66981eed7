"""Streams fed from one pass against the same streams read alone: bitwise, for every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import torch

from letheon.errors import InputError
from letheon.loaders.backends.base import Backend
from letheon.loaders.backends.shared_pass import plan_pass, serve, shared_pass, source
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Batch, Reader, Reads, Stream
from letheon.loaders.factory import Kind, make_loader
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.order import Part, epoch_parts
from letheon.loaders.preset import Preset
from tests.world import images as noise

PRESET = Preset(size=32, resize_to=40)
# Who reads what in which batches: two alike, two sizes of one stream, and every other stream.
READERS: tuple[tuple[Reads, int], ...] = (
    ("retain", 8), ("forget", 8), ("mixed", 7), ("retain", 8), ("retain", 5), ("paired", 6),
)  # fmt: skip
FORGET = np.arange(101) % 5 == 2


# torch starts workers for every stream of every rank: a cost of seconds.
PAIRS = [
    pytest.param(kind, room, world, marks=[pytest.mark.slow] if kind == "torch" and slow else [])
    for kind in ("torch", "beton", "resident")
    for room, world, slow in (
        (0, 1, False), (9, 3, True), (10**6, 1, False),
        (0, 3, True), (9, 1, True), (10**6, 3, True),
    )
]  # fmt: skip


@pytest.mark.parametrize(("kind", "room", "world"), PAIRS)
def test_as_read_alone(
    kind: Kind, room: int, world: int, images: BetonImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("letheon.loaders.backends.shared_pass._room", lambda *told: room)
    forget = np.arange(len(images)) % 3 == 0
    orders = []
    for rank in range(world):
        loaders = [
            make_loader(kind, images, forget, PRESET, size, Reader(4, rank, world, workers=2))
            for _, size in READERS
        ]
        pairs = zip(loaders, READERS, strict=True)
        assert len({source(loader, reads) for loader, (reads, _) in pairs}) == 1
        found: list[list[Batch]] = [[] for _ in READERS]
        turns = []
        for those, batch in shared_pass(loaders, [reads for reads, _ in READERS], 2):
            turns.append(those)
            for k in those:
                found[k].append(batch)
        orders.append(turns)
        assert all(one is other for one, other in zip(found[0], found[3], strict=True))
        for (reads, _), loader, got in zip(READERS, loaders, found, strict=True):
            for ours, theirs in zip(got, loader.train(reads, 2), strict=True):
                assert ours.total == theirs.total
                for a, b in zip(ours[:4], theirs[:4], strict=True):
                    assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
    assert all(turns == orders[0] for turns in orders)  # the ranks must step in one order


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("room", [0, 10**6])
def test_streams_of_other_lengths_and_batches_share_a_pass(
    room: int, world: int, images: BetonImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("letheon.loaders.backends.shared_pass._room", lambda *told: room)
    forget = np.arange(len(images)) % 3 == 0
    streams = [
        Stream("retain", image_size=24), Stream("forget", 5, 24, steps=9),
        Stream("mixed", 11, 24, share=0.4), Stream("paired", None, 24, steps=7),
    ]  # fmt: skip
    for rank in range(world):
        loaders = [
            make_loader("beton", images, forget, PRESET, 8, Reader(4, rank, world)) for _ in streams
        ]
        found: list[list[Batch]] = [[] for _ in streams]
        for numbers, batch in shared_pass(loaders, streams, 2):
            for k in numbers:
                found[k].append(batch)
        for stream, loader, got in zip(streams, loaders, found, strict=True):
            for mine, alone in zip(got, loader.train(stream, 2), strict=True):
                assert mine.total == alone.total
                assert all(torch.equal(a, b) for a, b in zip(mine[:4], alone[:4], strict=True))


def test_another_seed_preset_or_split_is_another_source() -> None:
    data = noise()
    forget = data.labels == 1
    same = Preset(size=8, resize="none", resize_to=8, augment="shift")
    other = Preset(size=8, resize="none", resize_to=8, augment="none")
    first = TorchLoader(data, forget, same, 8, Reader(0))
    assert source(first, "mixed") == source(TorchLoader(data, forget, same, 4, Reader(0)), "retain")
    assert source(first, "mixed") == source(first, Stream("forget", 4, 8, steps=9))
    assert source(first, "mixed") != source(first, Stream("mixed", image_size=16))
    for differing in (
        TorchLoader(data, forget, same, 8, Reader(1)),
        TorchLoader(data, ~forget, same, 8, Reader(0)),
        TorchLoader(data, forget, other, 8, Reader(0)),
    ):
        assert source(first, "mixed") != source(differing, "mixed")


def index_only(parts: list[Part]) -> Iterator[Batch]:
    """Batches whose images are (sample, turn), without a picture."""
    for part in parts:
        told = torch.from_numpy(np.stack([part.samples, part.turn], axis=1)).float()
        number = torch.from_numpy(part.samples)
        yield Batch(told[:, :, None, None], number, number > 0, number, part.total)


@pytest.mark.parametrize("room", [0, 10, 30, 200])
@pytest.mark.parametrize("world", [1, 2])
def test_nothing_is_made_twice_within_the_room(room: int, world: int) -> None:
    """And no more than the room is kept, beside the newest chunk."""
    readers: tuple[tuple[Reads, int], ...] = (("retain", 16), ("mixed", 16), ("forget", 8))
    for rank in range(world):
        streams = [epoch_parts(reads, FORGET, size, 7, 3, rank, world) for reads, size in readers]
        plan = plan_pass(streams, room)
        made = np.concatenate([chunk.samples for chunk in plan.chunks])
        wanted = np.unique(np.concatenate([part.samples for s in streams for part in s]))
        assert np.array_equal(np.unique(made), wanted)
        if room == 200:
            assert len(made) == len(wanted)
        got: list[list[Batch]] = [[] for _ in streams]
        for stream, batch in serve(plan, index_only, lambda part: next(index_only([part]))):
            got[stream].append(batch)
        for stream, parts in enumerate(streams):
            for batch, part in zip(got[stream], parts, strict=True):
                assert torch.equal(batch.index, torch.from_numpy(part.samples))
                assert torch.equal(batch.images[:, 0, 0, 0], batch.index.float())
                assert torch.equal(batch.images[:, 1, 0, 0], torch.from_numpy(part.turn).float())


def test_one_rank_needs_little_room() -> None:
    """All streams run through the samples in one order: what waits is about a batch of each."""
    readers: tuple[tuple[Reads, int], ...] = (("retain", 16), ("mixed", 16), ("forget", 8))
    forget = np.arange(5000) % 5 == 2
    streams = [epoch_parts(reads, forget, size, 7, 3) for reads, size in readers]
    plan = plan_pass(streams, 400)
    assert sum(len(chunk.samples) for chunk in plan.chunks) == 5000


def test_a_resident_set_is_kept_once(images: BetonImages) -> None:
    forget = np.arange(len(images)) % 3 == 0
    first = cast(Backend, make_loader("resident", images, forget, PRESET, 8, Reader(1)))
    other = first.resplit(~forget, 5, 2)
    fresh = make_loader("resident", images, ~forget, PRESET, 5, Reader(2))
    for a, b in zip(other.train("forget", 1), fresh.train("forget", 1), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.forget, b.forget)
    assert first.batch_size == 8 and first.seed == 1 and first.forget is forget
    with pytest.raises(InputError, match="expected at least one image each"):
        first.resplit(forget, 0, 1)
