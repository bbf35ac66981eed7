"""Map-style datasets as image sets, and their own tensors in batches, against plain indexing."""

from __future__ import annotations

import pickle
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from letheon.errors import InputError, UnreadableImage
from letheon.loaders import order
from letheon.loaders.backends.shared_pass import shared_pass, source
from letheon.loaders.backends.tensor_loader import TensorLoader
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader, Reads, Stream
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.datasets.label_files import COLUMNS
from letheon.loaders.datasets.map_style import MapStyleImages
from letheon.loaders.factory import make_loader
from letheon.loaders.preset import Preset

N = 23
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 6, 8, 3), dtype=np.uint8)
LABELS = np.arange(N) * 5 % 4
FORGET = LABELS == 1
PRESET = Preset(size=8, resize="none")
FORMS: dict[str, Any] = {
    "pil": Image.fromarray,
    "array": lambda pixels: pixels,
    "planes": lambda pixels: pixels.transpose(2, 0, 1),
    "tensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
}


class Images:
    """A dataset whose items have one of `FORMS`."""

    def __init__(self, form: str, **lists: Any) -> None:
        self.form = form
        self.__dict__.update(lists)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return FORMS[self.form](PIXELS[i]), int(LABELS[i])


class Tensors(Images):
    """A dataset with a transform of its own; `noise` makes it a random one."""

    def __init__(self, noise: bool = False) -> None:
        super().__init__("tensor")
        self.noise = noise

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = FORMS["tensor"](PIXELS[i]).float() / 255
        return image + self.noise * torch.rand(3, 6, 8), int(LABELS[i])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_set(form: str) -> None:
    images = MapStyleImages(Images(form))
    assert np.array_equal(images.labels, LABELS) and images.classes == ("0", "1", "2", "3")
    for i in range(N):
        assert np.array_equal(images.read(i), PIXELS[i])
    assert not images.tensors
    assert images.digest == MapStyleImages(Images("array")).digest
    again = pickle.loads(pickle.dumps(images))
    assert np.array_equal(again.read(3), PIXELS[3]) and again.digest == images.digest


def test_grey_images_become_rgb() -> None:
    grey = PIXELS[:, :, :, 0]
    for form in (grey, grey[:, None], [Image.fromarray(one) for one in grey]):
        images = MapStyleImages([(image, 0) for image in form])
        assert np.array_equal(images.read(5), np.stack([grey[5]] * 3, axis=2))


def test_labels_and_classes_the_dataset_lists_are_used_where_they_fit() -> None:
    names = ["ant", "bee", "cat", "dog"]
    for listed in ({"targets": LABELS.tolist()}, {"labels": torch.from_numpy(LABELS)}):
        images = MapStyleImages(Images("array", classes=names, **listed))
        assert np.array_equal(images.labels, LABELS) and images.classes == tuple(names)
    for wrong in (
        {"targets": LABELS[:-1]}, {"targets": LABELS + 1}, {"labels": [str(k) for k in LABELS]},
        {"targets": 3 - LABELS, "target_transform": lambda k: 3 - k}, {"classes": names[:2]},
    ):  # fmt: skip
        images = MapStyleImages(Images("array", **wrong))
        assert np.array_equal(images.labels, LABELS) and images.classes == ("0", "1", "2", "3")
    part = Subset(Images("array", targets=LABELS, classes=names), [7, 2])  # type: ignore[arg-type]
    images = MapStyleImages(part)
    assert images.labels.tolist() == LABELS[[7, 2]].tolist() and images.classes == tuple(names)
    assert np.array_equal(images.read(0), PIXELS[7])


def test_the_digest_knows_labels_pixels_and_classes() -> None:
    items = [(PIXELS[i], int(LABELS[i])) for i in range(N)]
    digests = {MapStyleImages(items).digest, MapStyleImages(items[::-1]).digest}
    changed = PIXELS[9].copy()
    changed[0, 0, 0] ^= 1
    digests.add(MapStyleImages([*items[:9], (changed, items[9][1]), *items[10:]]).digest)
    digests.add(MapStyleImages(Images("array", classes=list("abcd"))).digest)
    assert len(digests) == 4


@pytest.mark.parametrize("column", COLUMNS)
def test_labels_are_read_from_the_columns_that_files_of_datasets_have(column: str) -> None:
    images = MapStyleImages([{"image": PIXELS[i], column: int(LABELS[i])} for i in range(N)])
    assert np.array_equal(images.labels, LABELS)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(InputError, match="empty dataset"):
        MapStyleImages([])
    with pytest.raises(InputError, match="expected one with image and label"):
        MapStyleImages([{"image": PIXELS[0]}])
    with pytest.raises(InputError, match="expected \\(image, integer label\\)"):
        MapStyleImages([PIXELS[0]])
    with pytest.raises(InputError, match="got the label -1"):
        MapStyleImages([(PIXELS[0], -1)])
    with pytest.raises(InputError, match=r"list\[0\]: got a float64 image of shape \(6, 8, 3\)"):
        MapStyleImages([(PIXELS[0] / 255, 0)]).read(0)
    images = MapStyleImages(Images("array", targets=LABELS))
    with pytest.raises(UnreadableImage, match=r"Images\[99\]: got an unreadable image"):
        images.read(99)


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_datasets_are_read_by_the_plain_loader(workers: int) -> None:
    whole = ArrayImages("x", PIXELS, LABELS, list("0123"))
    plain = TorchLoader(whole, FORGET, PRESET, 6, Reader(3))
    mine = make_loader(
        "auto", MapStyleImages(Images("pil")), FORGET, PRESET, 6, Reader(3, workers=workers)
    )
    for one, other in zip(mine.train("paired", 1), plain.train("paired", 1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("reads", get_args(Reads))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_tensors_are_the_datasets_own(reads: Reads, world: int) -> None:
    dataset = Tensors()
    for stream in (Stream(reads), Stream(reads, 5, steps=9)):
        for rank in range(world):
            loader = make_loader(
                "auto", MapStyleImages(dataset), FORGET, PRESET, 6, Reader(3, rank, world)
            )
            assert isinstance(loader, TensorLoader)
            parts = order.epoch_parts(stream, FORGET, 6, 3, 2, rank, world)
            for batch, part in zip(loader.train(stream, 2), parts, strict=True):
                assert batch.index.tolist() == part.samples.tolist() and batch.total == part.total
                assert torch.equal(batch.images, torch.stack([dataset[i][0] for i in part.samples]))
                assert batch.labels.tolist() == LABELS[part.samples].tolist()
                assert batch.forget.tolist() == FORGET[part.samples].tolist()
                assert batch.images.is_contiguous(memory_format=torch.channels_last)


def keyed_images(world: int, workers: int, epoch: int, stream: Any) -> dict[tuple[int, int], bytes]:
    found = {}
    for rank in range(world):
        images = MapStyleImages(Tensors(noise=True))
        loader = make_loader(
            "tensor", images, FORGET, PRESET, 6, Reader(3, rank, world, workers=workers)
        )
        parts = order.epoch_parts(stream, FORGET, 6, 3, epoch, rank, world)
        for batch, part in zip(loader.train(stream, epoch), parts, strict=True):
            for i, turn, image in zip(part.samples, part.turn, batch.images, strict=True):
                found[int(i), int(turn)] = image.numpy().tobytes()
    return found


def test_random_transforms_are_keyed_by_seed_epoch_and_sample() -> None:
    stream = Stream("mixed", steps=8)  # two turns
    before = torch.get_rng_state()
    one = keyed_images(1, 0, 2, stream)
    assert torch.equal(before, torch.get_rng_state())
    assert len(one) == 2 * N == len(set(one.values()))
    torch.rand(5)
    for world, workers in ((1, 2), (3, 0)):
        assert keyed_images(world, workers, 2, stream) == one
    assert not set(keyed_images(1, 0, 3, stream).values()) & set(one.values())
    images = MapStyleImages(Tensors(noise=True))
    loader = make_loader("auto", images, FORGET, PRESET, 6, Reader(3))
    first, second = (torch.cat([b.images for b in loader.sweep()]) for _ in range(2))
    assert torch.equal(first, second) and images.digest == images.digest


def test_runs_share_a_pass_over_tensors() -> None:
    images = MapStyleImages(Tensors(noise=True))
    loaders = [make_loader("auto", images, FORGET, PRESET, size, Reader(3)) for size in (6, 5)]
    assert source(loaders[0], "mixed") == source(loaders[1], "retain")
    other = make_loader("auto", MapStyleImages(Tensors(noise=True)), FORGET, PRESET, 6, Reader(3))
    assert source(loaders[0], "mixed") != source(other, "mixed")
    found: list[list[torch.Tensor]] = [[], []]
    for readers, batch in shared_pass(loaders, ["mixed", "retain"], 1):
        for k in readers:
            found[k].append(batch.images)
    for k, reads in enumerate(("mixed", "retain")):
        alone = [batch.images for batch in loaders[k].train(reads, 1)]  # type: ignore[arg-type]
        assert all(map(torch.equal, found[k], alone)) and len(alone) == len(found[k])


def test_tensors_go_with_no_other_loader_and_no_other_size() -> None:
    tensors, decoded = MapStyleImages(Tensors()), MapStyleImages(Images("pil"))
    with pytest.raises(InputError, match="got the loader torch") as caught:
        make_loader("torch", tensors, FORGET, PRESET, 6, Reader(3))
    assert caught.value.option == "loader"
    with pytest.raises(InputError, match="not float tensors"):
        make_loader("tensor", decoded, FORGET, PRESET, 6, Reader(3))
    loader = make_loader("auto", tensors, FORGET, PRESET, 6, Reader(3))
    with pytest.raises(InputError, match="got an image size of 16"):
        next(loader.train(Stream("mixed", image_size=16), 0))
