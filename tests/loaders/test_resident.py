"""Images kept on the device: what is kept, what it takes, and that it changes no pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.errors import InputError
from letheon.loaders.backends import resident_loader
from letheon.loaders.backends.resident_loader import ResidentLoader
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.batch import Reader, Reads, Stream
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.factory import CacheOptions, make_loader
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset
from tests.pool import on_ranks

PRESET = Preset(size=32, resize_to=40)
FORGET = np.arange(34) % 4 == 0


@pytest.fixture
def images(photographs: Path) -> ImageSet:
    (found,) = open_source(str(photographs)).values()  # type: ignore[union-attr]
    assert isinstance(found, ImageSet)
    return found


def test_it_tells_what_it_will_take_and_takes_it(images: ImageSet) -> None:
    lines: list[str] = []
    loader = ResidentLoader(images, FORGET, PRESET, 8, Reader(3), keep=FORGET, tell=lines.append)
    tallest = max(images.read(i).shape[0] for i in np.flatnonzero(FORGET))
    widest = max(images.read(i).shape[1] for i in np.flatnonzero(FORGET))
    assert loader._pixels.shape == (9, tallest, widest, 3)
    assert lines[0].startswith(f"9 of 34 images as bytes of {tallest} x {widest}: 0.00 GiB of")


def test_what_does_not_fit_is_refused_before_it_is_taken(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_loader, "free_bytes", lambda device: 34 * 100 * 100)
    monkeypatch.setattr(resident_loader, "_load_pixels", lambda *args: pytest.fail("was taken"))
    lines: list[str] = []
    with pytest.raises(InputError, match="keep fewer, give a smaller side"):
        ResidentLoader(images, FORGET, PRESET, 8, Reader(3), tell=lines.append)
    assert len(lines) == 1


def test_a_kept_part_mixes_with_images_from_the_host(images: ImageSet) -> None:
    lines: list[str] = []
    part = make_loader(
        "resident",
        images,
        FORGET,
        PRESET,
        8,
        Reader(3),
        tell=lines.append,
        caches=CacheOptions(resident_forget=True),
    )
    assert lines[0].startswith(f"{FORGET.sum()} of 34 images as bytes")
    for kind, shard in (("beton", False), ("auto", False), ("resident", True)):
        with pytest.raises(InputError, match="resident forget"):
            CacheOptions(shard, resident_forget=True).check(kind)  # type: ignore[arg-type]
    whole = ResidentLoader(images, FORGET, PRESET, 8, Reader(3))
    host = BetonLoader(images, FORGET, PRESET, 8, Reader(3))
    for one, kept, other in zip(
        part.train("mixed", 1), whole.train("mixed", 1), host.train("mixed", 1), strict=True
    ):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.images[one.forget], kept.images[one.forget])
        assert torch.equal(one.images[~one.forget], other.images[~one.forget])


def test_smaller_images_have_the_same_boxes(images: ImageSet) -> None:
    small = ResidentLoader(images, FORGET, PRESET, 34, Reader(3), side=60)
    full = ResidentLoader(images, FORGET, PRESET, 34, Reader(3))
    one, other = next(small.train("mixed", 1)), next(full.train("mixed", 1))
    apart = (one.images - other.images).abs().mean(dim=(1, 2, 3))
    strange = (one.images - other.images.roll(1, 0)).abs().mean(dim=(1, 2, 3))
    assert (apart < strange).all() and apart.mean() < 0.2 * strange.mean()
    host = BetonLoader(images, FORGET, PRESET, 34, Reader(3))
    assert torch.equal(next(small.sweep()).images, next(host.sweep()).images)


def test_small_sets_are_kept_in_their_test_geometry(array_images: Any) -> None:
    preset = Preset(size=16, resize="none", augment="pad-crop-flip")
    images = array_images(40)
    loader = ResidentLoader(images, np.arange(40) % 2 == 0, preset, 10, Reader(1))
    other = BetonLoader(images, np.arange(40) % 2 == 0, preset, 10, Reader(1))
    for one, two in zip(loader.train("paired", 3), other.train("paired", 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
    with pytest.raises(InputError, match="make a new loader"):
        loader.train(Stream("mixed", image_size=24), 0)


def drawn(
    ranks: Ranks, folder: str, preset: Preset, batch_size: int, shard: bool
) -> tuple[int, list[tuple[list[int], int, torch.Tensor]], list[torch.Tensor]]:
    """Bytes kept; what this rank trains on for two epochs of two streams; what it sweeps."""
    (images,) = open_source(folder).values()  # type: ignore[union-attr]
    assert isinstance(images, ImageSet)
    loader = make_loader(
        "resident",
        images,
        FORGET,
        preset,
        batch_size,
        Reader(3, ranks.rank, ranks.world),
        caches=CacheOptions(resident_shard=shard),
    )
    assert isinstance(loader, ResidentLoader)
    streams: tuple[Stream | Reads, ...] = ("paired", "mixed", Stream("retain", 7, steps=9))
    found = [
        (batch.index.tolist(), batch.total, batch.images)
        for reads in streams
        for epoch in (0, 1)
        for batch in loader.train(reads, epoch, skip=epoch)
    ]
    return loader._pixels.nbytes, found, [batch.images for batch in loader.sweep()]


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "preset", [PRESET, Preset(16, resize="square", resize_to=18, augment="pad-crop-flip")]
)
def test_a_set_shared_out_over_the_ranks_gives_the_batches_of_a_whole_one(
    photographs: Path, world: int, preset: Preset
) -> None:
    for batch_size in (8, 5):  # with 5, a rank may keep none of a batch
        whole = on_ranks(world, drawn, str(photographs), preset, batch_size, False)
        shared = on_ranks(world, drawn, str(photographs), preset, batch_size, True)
        (_, alone, _) = drawn(Ranks(), str(photographs), preset, batch_size, False)
        for (taken, one, swept), (all_taken, other, all_swept) in zip(shared, whole, strict=True):
            assert world == 1 or taken < 0.7 * all_taken
            for mine, theirs in zip(one, other, strict=True):
                assert mine[:2] == theirs[:2] and torch.allclose(mine[2], theirs[2], atol=1e-5)
            for mine_swept, theirs_swept in zip(swept, all_swept, strict=True):
                assert mine_swept.shape == theirs_swept.shape
                # In the shared-out set, the test transform is the host's.
                assert (mine_swept - theirs_swept).abs().mean() < 0.02
        for k, (index, _, images) in enumerate(alone):  # one rank that keeps everything
            known = dict(zip(index, images, strict=True)) if len(set(index)) == len(index) else {}
            for _, one, _ in shared:
                for i, image in zip(one[k][0], one[k][2], strict=True):
                    assert i in index
                    assert i not in known or torch.allclose(known[i], image, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_gives_the_hosts_pixels(images: ImageSet) -> None:
    there = ResidentLoader(images, FORGET, PRESET, 8, Reader(3, device="cuda"))
    here = ResidentLoader(images, FORGET, PRESET, 8, Reader(3))
    for one, other in zip(there.train("paired", 1), here.train("paired", 1), strict=True):
        assert one.images.is_cuda and torch.equal(one.index.cpu(), other.index)
        assert torch.allclose(one.images.cpu(), other.images, atol=1e-4)
