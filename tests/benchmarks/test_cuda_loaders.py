"""The device half of every loader, computed on the host as on a GPU: the CPU's batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from step_budget.cuda_on_host import CudaTensor, cuda_on_host, is_pinned
from step_budget.fake_cuda import CUDA

from letheon.loaders.backends import dali_loader, ffcv_loader
from letheon.loaders.backends.base import Backend
from letheon.loaders.backends.shared_pass import shared_pass
from letheon.loaders.batch import Batch, Reader, Stream
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.datasets.map_style import MapStyleImages
from letheon.loaders.factory import CacheOptions, Kind, make_loader
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_source
from letheon.loaders.preset import ALTERNATE, Preset
from tests.marks import slow_but
from tests.world import PRESET, images

COUNT = 17
FORGET = np.arange(COUNT) % 4 == 0
BOX = Preset(size=16, resize_to=20)
SQUARE = dataclasses.replace(PRESET, augment="pad-crop-flip")
ALTERNATING = dataclasses.replace(PRESET, augment=ALTERNATE[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """JPEGs of several sizes, and one PNG, which DALI does not take."""
    root = tmp_path_factory.mktemp("files")
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((24 + number, 30))
        place = root / "ab"[number % 2] / f"{number:02}.jpg"
        place.parent.mkdir(exist_ok=True)
        picture.save(place, "PNG" if number == 5 else "JPEG")
    (found,) = open_source(str(root)).values()  # type: ignore[union-attr]
    assert isinstance(found, ImageSet)
    return found


@pytest.fixture(scope="module")
def beton(files: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> BetonImages:
    out = tmp_path_factory.mktemp("beton") / "set.beton"
    write_beton(files, out, Encoding(raw=0.4))
    return BetonImages(out)


class Tensors(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Float tensors, as of a dataset with a transform of its own."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 8, 8), float(i)), i % 3


class Pipeline:
    """DALI's pipeline: its decoder and filter are not here, so that pixels tell sizes and boxes."""

    def __init__(self, loader: Backend, source: str) -> None:
        self.device, self.source = loader.device, source

    def run(self, **inputs: Any) -> list[Any]:
        """Decoded images of one size, or squares of the sums of what is given."""
        if self.source == "decode":
            return [[self._place(np.full((9, 9, 3), len(one), np.uint8)) for one in inputs["jpeg"]]]
        size = int(inputs["size"][0][0])
        numbers = [s.sum() + e.sum() + m for s, e, m in zip(
            inputs["start"], inputs["extent"], inputs["mirror"], strict=True
        )]  # fmt: skip
        rows = np.ones((len(numbers), size, size, 3), np.float32) * np.array(
            numbers, np.float32
        ).reshape(-1, 1, 1, 1)
        return [_Rows(self._place(rows))]

    def _place(self, array: NDArray[Any]) -> Any:
        return array if self.device.type == "cpu" else torch.from_numpy(array).to(self.device)


class _Rows:
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def as_tensor(self) -> Any:
        return self.rows


def pixels_of_ffcv(self: Any, part: Any, epoch: int, preset: Preset) -> NDArray[np.uint8]:
    """Bytes that tell the samples, for those of ffcv's decoder."""
    shape = (len(part.samples), preset.size, preset.size, 3)
    return np.broadcast_to(part.samples.reshape(-1, 1, 1, 1), shape).astype(np.uint8)


@pytest.fixture
def loaders(
    files: ImageSet, beton: BetonImages, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Callable[[torch.device], Backend]]:
    """Every way of delivering images, by name: from the device to the loader."""
    for module in (dali_loader, ffcv_loader):
        monkeypatch.setattr(module, "is_installed", lambda: True)
    monkeypatch.setattr(
        dali_loader, "_build_pipeline",
        lambda source, training, most, loader, preset: Pipeline(loader, source),
    )  # fmt: skip
    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", lambda tensor: tensor)
    monkeypatch.setattr(ffcv_loader.FfcvLoader, "_pixels", pixels_of_ffcv)
    noise = images(COUNT)
    of: dict[str, tuple[Kind, ImageSet, Preset, CacheOptions, int]] = {
        "torch": ("torch", noise, PRESET, CacheOptions(), 0),
        "tensor": ("tensor", MapStyleImages(Tensors()), PRESET, CacheOptions(), 0),
        "files": ("beton", files, BOX, CacheOptions(), 0),
        "files, threads": ("beton", files, BOX, CacheOptions(), 2),
        "beton": ("beton", beton, BOX, CacheOptions(), 0),
        "ffcv": ("ffcv", beton, BOX, CacheOptions(), 1),
        "dali": ("dali", files, BOX, CacheOptions(), 1),
        "dali, cache": ("dali", files, BOX, CacheOptions(dali_cache=1e-6), 1),
        "resident": ("resident", beton, BOX, CacheOptions(), 2),
        "resident, noise": ("resident", noise, PRESET, CacheOptions(), 0),
        "resident, crop": ("resident", noise, SQUARE, CacheOptions(), 0),
        "resident, alternating": ("resident", noise, ALTERNATING, CacheOptions(), 0),
        "resident, forget": ("resident", files, BOX, CacheOptions(resident_forget=True), 0),
        "resident, shard": ("resident", beton, BOX, CacheOptions(resident_shard=True), 0),
    }

    def maker(name: str) -> Callable[[torch.device], Backend]:
        kind, source, preset, caches, workers = of[name]

        def make(device: torch.device) -> Backend:
            reader = Reader(3, workers=workers, device=device)
            loader = make_loader(kind, source, FORGET, preset, 5, reader, caches)
            assert isinstance(loader, Backend)
            return loader

        return make

    return {name: maker(name) for name in of}


NAMES = (
    "torch", "tensor", "files", "files, threads", "beton", "ffcv", "dali", "dali, cache",
    "resident", "resident, noise", "resident, crop", "resident, alternating", "resident, forget",
    "resident, shard",
)  # fmt: skip
STREAMS = (Stream("paired"), Stream("retain", 4, steps=2))


def read(loader: Backend) -> list[Batch]:
    """Batches of training, of the test transform, and of a pass that two runs share."""
    batches = [batch for stream in STREAMS for batch in loader.train(stream, 1)]
    batches += loader.sweep()
    if loader.shares_pass:
        other = loader.resplit(FORGET, 3, 3)
        batches += [batch for _, batch in shared_pass([loader, other], ["mixed", "mixed"], 2)]
    return batches


QUICK = {"resident", "tensor", "files", "dali", "ffcv"}


@pytest.mark.parametrize("name", slow_but(QUICK, NAMES))
def test_a_loader_gives_the_devices_batches_and_never_waits(
    name: str, loaders: dict[str, Callable[[torch.device], Backend]]
) -> None:
    assert set(NAMES) == set(loaders)
    expected = read(loaders[name](torch.device("cpu")))
    with cuda_on_host() as ledger:
        loader = loaders[name](CUDA)
        read(loader)  # what is kept from the first batch on
        ledger.clear()
        batches = read(loader)
        waits = dict(ledger.waits)
        assert len(batches) == len(expected) > 8
        for one, other in zip(batches, expected, strict=True):
            for got, wanted in zip(one[:4], other[:4], strict=True):
                # The step copies what comes from the host without a wait only if it is pinned.
                assert (
                    is_pinned(got) if name in ("torch", "tensor") else isinstance(got, CudaTensor)
                )
                torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=2e-6)
            assert one.total == other.total
            assert one.images.is_contiguous(memory_format=torch.channels_last)
    assert not waits
