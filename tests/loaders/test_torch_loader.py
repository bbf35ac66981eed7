"""The plain loader against a one-rank, in-process run and against the definition."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from letheon.errors import InputError
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Batch, Reader, Reads
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.open import open_data
from letheon.loaders.preset import Preset

SHIFT = Preset(size=16, resize="none", augment="shift")
Make = Callable[[int], ArrayImages]
STREAMS: tuple[Reads, ...] = ("forget", "retain", "mixed", "paired")


def rows(batches: list[Batch]) -> dict[int, bytes]:
    return {
        int(i): image.numpy().tobytes()
        for batch in batches
        for i, image in zip(batch.index, batch.images, strict=True)
    }


def same(a: Batch, b: Batch) -> bool:
    return a.total == b.total and all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_augmentation_does_not_know_the_number_of_ranks(array_images: Make, world: int) -> None:
    images = array_images(101)
    forget = images.labels == 1
    alone = rows(list(TorchLoader(images, forget, SHIFT, 16, Reader(5)).train("mixed", 2)))
    shared: dict[int, bytes] = {}
    for rank in range(world):
        shared |= rows(
            list(TorchLoader(images, forget, SHIFT, 16, Reader(5, rank, world)).train("mixed", 2))
        )
    assert shared == alone and len(alone) == 101


@pytest.mark.parametrize("reads", STREAMS)
def test_workers_skip_and_repetition_change_nothing(array_images: Make, reads: Reads) -> None:
    images = array_images(60)
    forget = images.labels == 1
    plain = TorchLoader(images, forget, SHIFT, 8, Reader(1))
    first = list(plain.train(reads, 4))
    assert len(first) == plain.steps(reads)
    assert all(map(same, first, plain.train(reads, 4)))
    workers = list(TorchLoader(images, forget, SHIFT, 8, Reader(1, workers=2)).train(reads, 4))
    assert len(workers) == len(first) and all(map(same, first, workers))
    assert all(map(same, first[2:], plain.train(reads, 4, skip=2)))


@pytest.mark.parametrize("reads", STREAMS)
def test_fields_follow_the_index(array_images: Make, reads: Reads) -> None:
    images = array_images(60)
    forget = images.labels == 1
    for batch in TorchLoader(
        images, forget, Preset(16, resize="none", augment="none"), 8, Reader(1)
    ).train(reads, 0):
        index = batch.index.numpy()
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.labels, images.labels[index])
        assert np.array_equal(batch.forget, forget[index])
        red = (batch.images[:, 0, 0, 0] * 0.229 + 0.485) * 255
        assert red.round().to(torch.int64).tolist() == (index % 251).tolist()
        if reads == "retain":
            assert not batch.forget.any()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("chosen", [None, [5, 3, 44, 0, 17]])
def test_sweep_gives_every_index_once_in_order(
    array_images: Make, world: int, chosen: list[int] | None
) -> None:
    images = array_images(45)
    seen: list[int] = []
    for rank in range(world):
        loader = TorchLoader(images, images.labels == 0, SHIFT, 16, Reader(0, rank, world))
        for batch in loader.sweep(chosen):
            seen += batch.index.tolist()
            assert batch.total == len(chosen or range(45))
    assert seen == (chosen or list(range(45)))


def test_sweep_is_not_augmented(array_images: Make) -> None:
    images = array_images(9)
    batches = list(TorchLoader(images, images.labels == 0, SHIFT, 4, Reader(0)).sweep())
    green = torch.cat([batch.images for batch in batches])[:, 1, :, 0] * 0.224 + 0.456
    assert torch.equal((green * 255).round(), torch.arange(16.0).expand(9, 16))


def test_an_epoch_left_early_frees_its_workers(array_images: Make) -> None:
    images = array_images(60)
    before = torch.get_rng_state()
    others = len(multiprocessing.active_children())  # of other tests
    batches = iter(
        TorchLoader(images, images.labels == 0, SHIFT, 4, Reader(0, workers=2)).train("mixed", 0)
    )
    next(batches)
    assert len(multiprocessing.active_children()) == others + 2
    del batches
    assert len(multiprocessing.active_children()) == others
    assert torch.equal(before, torch.get_rng_state())  # nothing drawn from the global generator


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_that_names_it(
    draw: Callable[..., Path], workers: int
) -> None:
    root = draw([f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in range(4)])
    (root / "train/b/2.png").write_bytes(b"")
    data = open_data(str(root))
    loader = TorchLoader(
        data.train, data.train.labels == 0, Preset(8), 4, Reader(0, workers=workers)
    )
    with pytest.raises(InputError, match=r"train/b/2\.png: got an unreadable image") as caught:
        list(loader.train("mixed", 0))
    assert "\n" not in str(caught.value)


def test_photographs_of_any_size_become_squares(draw: Callable[..., Path]) -> None:
    root = draw(["train/a/0.png", "train/b/1.png", "test/a/0.png", "test/b/1.png"], size=(30, 50))
    data = open_data(str(root))
    loader = TorchLoader(data.train, data.train.labels == 0, Preset(16, resize_to=20), 2, Reader(0))
    assert next(iter(loader.train("mixed", 0))).images.shape == (2, 3, 16, 16)
    assert next(iter(loader.sweep())).images.shape == (2, 3, 16, 16)
    assert pickle.loads(pickle.dumps(data.train)).path(0) == data.train.path(0)


def test_more_ranks_than_samples_of_a_batch_is_refused(array_images: Make) -> None:
    images = array_images(6)
    for batch_size, world in [(4, 5), (0, 1)]:
        with pytest.raises(InputError, match="process"):
            TorchLoader(images, images.labels == 0, SHIFT, batch_size, Reader(0, 0, world))
