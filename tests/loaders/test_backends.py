"""Every installed backend over one `.beton` of JPEGs and raw images, against the plain loader."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from letheon.errors import InputError
from letheon.loaders import order
from letheon.loaders.backends import dali_loader, ffcv_loader
from letheon.loaders.backends.resident_loader import ResidentLoader
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Batch, Loader, Reader, Reads, Stream
from letheon.loaders.decode import jpeg
from letheon.loaders.factory import Kind, make_loader
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset
from letheon.loaders.views import RelabeledImages

PRESET = Preset(size=32, resize_to=40)
KINDS: tuple[Kind, ...] = (
    "torch",
    "beton",
    "resident",
    *(("ffcv",) if ffcv_loader.is_installed() else ()),
    *(("dali",) if dali_loader.is_installed() else ()),
)
# Largest difference of a pixel to the plain loader's, in steps of 1/255: while training and for the
# test transform, the outermost row and column left out. The kernel and DALI use the same triangle
# filter and round once, not after each direction; at the border of a box they count other
# neighbours. ffcv averages areas.
TOLERANCE: dict[Kind, tuple[float, float]] = {
    "torch": (0, 0),
    "beton": (0, 0),
    "resident": (1, 1),
    "ffcv": (20, 0),
    "dali": (1, 1),
}
STREAMS: tuple[Reads, ...] = ("forget", "retain", "mixed", "paired")
Make = Callable[..., Loader]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def make(images: BetonImages, kind: Kind) -> Make:
    """A function that makes the backend; 34 images, of which 9 are to be forgotten."""
    forget = np.arange(len(images)) % 4 == 0

    def loader(batch_size: int = 8, seed: int = 3, rank: int = 0, world: int = 1, workers: int = 0,
               preset: Preset = PRESET) -> Loader:  # fmt: skip
        return make_loader(
            kind, images, forget, preset, batch_size, Reader(seed, rank, world, workers=workers)
        )

    return loader


def rows(batches: Iterator[Batch]) -> list[tuple[int, bytes]]:
    return [
        (int(i), image.numpy().tobytes())
        for batch in batches
        for i, image in zip(batch.index, batch.images, strict=True)
    ]


def same(a: Batch, b: Batch) -> bool:
    return a.total == b.total and all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def assert_near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    """Inside as near as told, on average half of that; at the border twelve times less so."""
    apart = (a - b).abs() * torch.tensor(PRESET.std)[:, None, None] * 255
    assert apart[:, :, 1:-1, 1:-1].max() <= tolerance + 1e-3
    assert apart.max() <= 12 * tolerance + 1e-3 and apart.mean() <= tolerance / 2


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_an_epoch_and_change_no_pixel(make: Make, world: int) -> None:
    alone = rows(make(16).train("mixed", 2))
    shared = [
        row
        for rank in range(world)
        for row in rows(make(16, rank=rank, world=world).train("mixed", 2))
    ]
    assert sorted(index for index, _ in shared) == list(range(34))
    assert dict(shared) == dict(alone)


@pytest.mark.parametrize("reads", STREAMS)
def test_batches_are_the_plain_loaders_but_for_the_filter(
    make: Make, kind: Kind, images: BetonImages, reads: Reads
) -> None:
    forget = np.arange(len(images)) % 4 == 0
    plain = TorchLoader(images, forget, PRESET, 8, Reader(3))
    for mine, theirs in zip(make().train(reads, 5), plain.train(reads, 5), strict=True):
        assert mine.total == theirs.total
        assert all(torch.equal(x, y) for x, y in zip(mine[1:4], theirs[1:4], strict=True))
        assert mine.images.dtype == torch.float32
        assert mine.images.is_contiguous(memory_format=torch.channels_last)
        assert_near(mine.images, theirs.images, TOLERANCE[kind][0])


def test_the_test_transform_is_the_plain_loaders(
    make: Make, kind: Kind, images: BetonImages
) -> None:
    for preset in (PRESET, replace(PRESET, resize="crop-square", interpolation="bilinear")):
        plain = TorchLoader(images, np.zeros(34, np.bool_), preset, 8, Reader(3))
        mine = list(make(preset=preset).sweep())
        assert [len(batch.labels) for batch in mine] == [8, 8, 8, 8, 2]  # the last one is kept
        for one, other in zip(mine, plain.sweep(), strict=True):
            assert torch.equal(one.index, other.index) and torch.equal(one.labels, other.labels)
            assert_near(one.images, other.images, TOLERANCE[kind][1])


def test_a_sweep_of_some_images_is_shared_in_order(make: Make) -> None:
    wanted = [30, 2, 17, 5, 33]
    whole = rows(make().sweep(wanted))
    assert [index for index, _ in whole] == wanted
    shared = [row for rank in range(8) for row in rows(make(rank=rank, world=8).sweep(wanted))]
    assert shared == whole


def test_workers_epochs_and_skips(make: Make) -> None:
    first = list(make().train("mixed", 4))
    assert all(map(same, first, make().train("mixed", 4)))
    assert all(map(same, first, make(workers=2).train("mixed", 4)))
    assert all(map(same, first[2:], make(workers=1).train("mixed", 4, skip=2)))
    assert len(list(make().train("mixed", 4, skip=2))) == len(first) - 2
    assert not any(map(same, first, make().train("mixed", 5)))
    assert not any(map(same, first, make(seed=4).train("mixed", 4)))


def test_blocks_change_the_order_and_no_pixel(
    images: BetonImages, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "MIXED", 2)
    args = (kind, images, np.arange(34) % 4 == 0, PRESET, 8)
    full = make_loader(*args, Reader(3)).train("mixed", 1)
    blocks = list(make_loader(*args, Reader(3, block=4)).train("mixed", 1))
    assert dict(rows(iter(blocks))) == dict(rows(full))
    assert len(set((blocks[0].index // 4).tolist())) == 2
    with pytest.raises(InputError, match="a block of -1"):
        make_loader(*args, Reader(3, block=-1))


def test_batches_do_not_change_while_they_are_held(make: Make) -> None:
    loader = make(workers=1)
    held = list(loader.train("mixed", 0))
    copies = [batch.images.clone() for batch in held]
    list(loader.train("mixed", 1))
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))


def test_the_resolution_may_grow_without_a_new_loader(make: Make, kind: Kind) -> None:
    loader: Any = make(workers=1)
    for size, margin in ((32, 40), (48, 60), (32, 40), (20, 25)):
        now = next(loader.train(Stream("mixed", image_size=size), 1))
        scaled = replace(PRESET, size=size, resize_to=margin)
        fresh = next(make(preset=scaled).train("mixed", 1))
        assert now.images.shape == (8, 3, size, size) and same(now, fresh)
    assert loader.preset == PRESET and next(loader.sweep()).images.shape == (8, 3, 32, 32)


@pytest.mark.parametrize("world", [1, 3])
def test_batches_of_a_stream_are_those_of_a_loader_of_that_size(make: Make, world: int) -> None:
    for rank in range(world):
        loader = make(8, rank=rank, world=world)
        stream = Stream("mixed", 20)  # more than the loader's own
        other = make(20, rank=rank, world=world)
        assert loader.steps(stream) == other.steps("mixed") == 2
        assert all(map(same, loader.train(stream, 1), other.train("mixed", 1)))
        half = Stream("mixed", share=0.5)
        whole = list(loader.train("mixed", 1))
        assert loader.steps(half) == -(-len(whole) // 2)
        assert all(map(same, loader.train(half, 1), whole[: loader.steps(half)]))


def test_more_steps_than_an_epoch_draw_new_augmentation_and_skip(make: Make) -> None:
    loader = make()
    once = loader.steps("forget")
    stream = Stream("forget", steps=3 * once)
    batches = list(loader.train(stream, 2))
    assert len(batches) == loader.steps(stream) == 3 * once
    assert all(map(same, batches, loader.train("forget", 2)))
    for turn in (1, 2):
        again = loader.train("forget", order.turn_epoch(2, turn))
        assert all(map(same, batches[turn * once :], again))
    assert all(map(same, batches[once + 1 :], loader.train(stream, 2, skip=once + 1)))


def _memory() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_an_epoch_left_early_leaves_nothing_behind(make: Make, kind: Kind) -> None:
    if kind == "torch":
        workers, epochs = 0, 5  # processes; its own tests look at them
    else:
        workers, epochs = 2, 50
    loader = make(workers=workers)
    before, seen = set(threading.enumerate()), []
    for epoch in range(epochs):
        batches = loader.train("mixed", epoch)
        next(batches)
        if epoch % 2:
            batches.close()  # type: ignore[attr-defined]
        del batches
        seen.append(_memory())
        assert set(threading.enumerate()) <= before
    assert max(seen[-5:]) - max(seen[: epochs // 2]) < 8 * 2**20


def test_scaled_decoding_is_near_and_only_where_the_crop_is_large(images: BetonImages) -> None:
    forget = np.arange(34) % 4 == 0
    for size in (12, 200):
        preset = replace(PRESET, size=size)
        pair = [BetonLoader(images, forget, preset, 8, Reader(3), scaled=s) for s in (True, False)]
        changed = 0.0
        for one, other in zip(pair[0].train("mixed", 1), pair[1].train("mixed", 1), strict=True):
            assert torch.equal(one.index, other.index)
            changed += float((one.images - other.images).abs().mean())
        assert (changed > 0) == (size == 12 and jpeg.available()[0] == "turbo") and changed < 1


def test_folders_are_read_like_the_file_made_from_them(
    images: BetonImages, photographs: Path
) -> None:
    found = open_source(str(photographs))
    assert isinstance(found, dict)
    forget = np.arange(34) % 4 == 0
    (files,) = found.values()
    one, other = (BetonLoader(s, forget, PRESET, 8, Reader(3, workers=1)) for s in (files, images))
    assert all(map(same, one.train("paired", 1), other.train("paired", 1)))


def test_other_augmentations_are_the_plain_loaders(images: BetonImages) -> None:
    forget = np.arange(34) % 4 == 0
    for augmentation in ("none", "flip", "pad-crop-flip", "shift"):
        preset = Preset(size=32, resize="square", resize_to=36, augment=augmentation)
        plain = list(TorchLoader(images, forget, preset, 8, Reader(3)).train("mixed", 1))
        mine = BetonLoader(images, forget, preset, 8, Reader(3, workers=1))
        assert all(map(same, mine.train("mixed", 1), plain))
        kept = ResidentLoader(images, forget, preset, 8, Reader(3))
        assert all(map(same, kept.train("mixed", 1), plain))
        assert all(map(same, kept.sweep(), mine.sweep()))


def test_buffers_are_used_again_and_never_while_held(images: BetonImages) -> None:
    loader = BetonLoader(images, np.zeros(34, np.bool_), PRESET, 8, Reader(3))
    places = [batch.images.data_ptr() for batch in loader.train("mixed", 0)]
    assert len(set(places[:4])) < 4  # full batches that were let go of
    held = list(loader.train("mixed", 0))
    extents = sorted((b.images.data_ptr(), b.images.numel() * 4) for b in held)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(extents))


def test_other_label_numbers_do_not_hide_the_file(images: BetonImages, kind: Kind) -> None:
    forget = np.arange(34) % 4 == 0
    renamed = RelabeledImages(images, ("z", "b", "y", "a"))
    mine = make_loader(kind, renamed, forget, PRESET, 8, Reader(3)).train("mixed", 1)
    for one, other in zip(
        mine, make_loader(kind, images, forget, PRESET, 8, Reader(3)).train("mixed", 1), strict=True
    ):
        assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
        assert torch.equal(one.labels, torch.tensor([3, 1])[other.labels])
