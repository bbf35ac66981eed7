"""Our `.beton` files and the ffcv package's, each read by the other; ffcv's faults worked round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from letheon.errors import InputError
from letheon.loaders.backends.ffcv_loader import FfcvLoader, is_installed
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.factory import make_loader
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import crop_boxes

needs_ffcv = pytest.mark.skipif(not is_installed(), reason="the ffcv package is not installed")
PRESET = Preset(size=32, resize_to=40)


@pytest.fixture
def files(photographs: Path) -> FileImages:
    found = open_source(str(photographs))
    assert isinstance(found, dict)
    (images,) = found.values()
    assert isinstance(images, FileImages)
    return images


@needs_ffcv
@pytest.mark.parametrize("raw", [0.0, 0.5, 1.0])
def test_ffcv_reads_what_we_write(files: FileImages, tmp_path: Path, raw: float) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    path = tmp_path / "set.beton"
    write_beton(files, path, Encoding(raw=raw))
    reader = Reader(str(path))
    assert reader.field_names == ["image", "label", "index"] and reader.num_samples == 34
    before = torch.get_num_threads()
    loader = Loader(
        str(path), 8, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
        pipelines={
            "image": [CenterCropRGBImageDecoder((40, 40), 1.0)],
            "label": [IntDecoder()],
            "index": [IntDecoder()],
        },
    )  # fmt: skip
    batches = [[np.array(part) for part in batch] for batch in loader]
    torch.set_num_threads(before)
    images, labels, index = (np.concatenate(part) for part in zip(*batches, strict=True))
    assert np.array_equal(labels[:, 0], files.labels)
    assert np.array_equal(index[:, 0], np.arange(34))
    for i, theirs in enumerate(images):
        image = files.read(i)
        side = min(image.shape[:2])
        top, left = ((edge - side) // 2 for edge in image.shape[:2])
        ours = torch.from_numpy(image[top : top + side, left : left + side].copy())
        area = torch.nn.functional.interpolate(
            ours.permute(2, 0, 1)[None].double(), (40, 40), mode="area"
        )
        assert (area[0].permute(1, 2, 0) - torch.from_numpy(theirs)).abs().mean() < 6


@needs_ffcv
@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion"])
def test_we_read_what_ffcv_writes(files: FileImages, tmp_path: Path, mode: str) -> None:
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Samples:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> tuple[float, np.ndarray, int]:
            return i / 2, files.read(i), int(files.labels[i])

    path = tmp_path / "theirs.beton"
    fields = {"weight": FloatField(), "image": RGBImageField(mode), "label": IntField()}
    # Two processes, so that blobs and samples are not in one order.
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(Samples(), chunksize=3)
    back = BetonImages(path)
    assert len(back) == 34 and np.array_equal(back.labels, files.labels)
    assert back.classes == ("0", "1") and len(back.digest) == 64
    for i in range(34):
        apart = np.abs(back.read(i).astype(int) - files.read(i))
        assert apart.max() == 0 if mode == "raw" else apart.mean() < 4
    forget = np.arange(34) % 4 == 0
    ours, theirs = (kind(back, forget, PRESET, 8, Reader(3)) for kind in (BetonLoader, FfcvLoader))
    for one, other in zip(ours.train("paired", 1), theirs.train("paired", 1), strict=True):
        assert torch.equal(one.index, other.index)


@needs_ffcv
def test_ffcv_leaves_the_threads_of_torch_alone(
    files: FileImages, tmp_path: Path, two_threads: None
) -> None:
    write_beton(files, tmp_path / "set.beton")
    loader = FfcvLoader(
        BetonImages(tmp_path / "set.beton"), np.zeros(34, np.bool_), PRESET, 8, Reader(3, workers=2)
    )
    assert len(list(loader.train("mixed", 0))) == 5
    assert torch.get_num_threads() == 2


@needs_ffcv
def test_a_truncated_image_is_not_trained_on_as_grey(files: FileImages, tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    write_beton(files, path)
    images = BetonImages(path)
    (one,) = images.read_encoded(np.array([4]))
    with open(path, "r+b") as file:
        file.seek(int(images.table["pointer"][4]) + len(one.data) // 2)
        file.write(bytes(len(one.data) - len(one.data) // 2))
    loader = FfcvLoader(images, np.zeros(34, np.bool_), PRESET, 8, Reader(3))
    with pytest.raises(InputError, match=r"set\.beton\[4\].*unreadable"):
        list(loader.train("mixed", 0))


def test_what_ffcv_cannot_do_is_said(files: FileImages, tmp_path: Path) -> None:
    none = np.zeros(34, np.bool_)
    if not is_installed():
        with pytest.raises(InputError, match="make ffcv"):
            make_loader("ffcv", files, none, PRESET, 8, Reader(3))
        return
    with pytest.raises(InputError, match=r"not in a \.beton"):
        make_loader("ffcv", files, none, PRESET, 8, Reader(3))
    write_beton(files, tmp_path / "set.beton")
    preset = Preset(size=32, augment="pad-crop-flip")
    with pytest.raises(InputError, match="pad-crop-flip"):
        make_loader("ffcv", BetonImages(tmp_path / "set.beton"), none, preset, 8, Reader(3))


def test_the_box_of_the_test_transform_is_the_cut_after_the_resize() -> None:
    shapes = np.array([[500, 375], [375, 500], [256, 256], [333, 1000]])
    box = crop_boxes.central(shapes, Preset(size=224, resize_to=256))
    for (height, width), (top, left, h, w) in zip(shapes.tolist(), box.tolist(), strict=True):
        tall, wide = 256 * height // min(height, width), 256 * width // min(height, width)
        assert np.isclose(h * tall / height, 224) and np.isclose(w * wide / width, 224)
        assert np.isclose(top * tall / height, round((tall - 224) / 2))
        assert np.isclose(left * wide / width, round((wide - 224) / 2))
