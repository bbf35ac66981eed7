"""Files that others wrote with ffcv, made by hand: other fields, orders, modes and names."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from letheon.errors import InputError
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.formats import beton
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.open import open_data, open_domains

TYPES = {"float": 0, "int": 1, "image": 2, "bytes": 3, "array": 4, "json": 5}
FORMATS = {"float": "<d", "int": "<q", "bytes": "<QQ", "array": "<Q", "json": "<QQ"}
PAGE = 2**21
Fields = list[tuple[str, str]]


def picture(number: int) -> np.ndarray:
    noise = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((20 + number, 16), Image.Resampling.BICUBIC))


def write(path: Path, fields: Fields, count: int, mode: str, first: int = 0) -> None:
    """By ffcv's format: header, fields, an aligned table, pages with gaps, allocations shuffled."""
    rows, offsets, size, widest = [], [], 0, 1
    for _, kind in fields:  # as numpy aligns a struct: images are packed
        width = 1 if kind == "image" else 8
        size = -(-size // width) * width
        offsets.append(size)
        size += 13 if kind == "image" else struct.calcsize(FORMATS[kind])
        widest = max(widest, width)
    size = -(-size // widest) * widest
    blobs, at = [], PAGE
    for n in range(first, first + count):
        row = bytearray(size)
        for (name, kind), offset in zip(fields, offsets, strict=True):
            if kind == "image":
                pixels, raw = picture(n), mode == "raw" or (mode == "proportion" and n % 2 == 0)
                data = pixels.tobytes()
                if not raw:
                    out = io.BytesIO()
                    Image.fromarray(pixels).save(out, "JPEG", quality=95)
                    data = out.getvalue()
                struct.pack_into("<BHHQ", row, offset, int(raw), *pixels.shape[1::-1], at)
                blobs.append((n - first, at, data))
                at += len(data) + 40
            elif kind == "int":
                struct.pack_into("<q", row, offset, n % 3 if name != "index" else n + 1000)
            else:
                filler = (at,) * (len(FORMATS[kind]) - 1)
                struct.pack_into(FORMATS[kind], row, offset, *filler)
        rows.append(bytes(row))
    end = -(-at // PAGE) * PAGE
    head = struct.pack("<HHIQQ", 2, len(fields), PAGE, count, end)
    for name, kind in fields:
        head += struct.pack("<B16s1024x", TYPES[kind], name.encode())
    with path.open("wb") as file:
        file.write(head + b"".join(rows))
        for _, pointer, data in blobs:
            file.seek(pointer)
            file.write(data)
        file.seek(end)
        for sample, pointer, data in reversed(blobs):
            file.write(struct.pack("<QQQ", sample, pointer, len(data)))


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion"])
@pytest.mark.parametrize(
    "fields",
    [
        [("image", "image"), ("label", "int")],
        [("y", "int"), ("x", "image")],
        [("weight", "float"), ("img", "image"), ("caption", "bytes"), ("cls", "int")],
        [("index", "int"), ("image", "image"), ("label", "int")],
        [("meta", "json"), ("vector", "array"), ("image", "image"), ("target", "int")],
    ],
    ids=lambda fields: "-".join(name for name, _ in fields),
)
def test_fields_in_any_order(tmp_path: Path, fields: Fields, mode: str) -> None:
    write(tmp_path / "set.beton", fields, 9, mode)
    images = BetonImages(tmp_path / "set.beton")
    assert images.labels.tolist() == [n % 3 for n in range(9)]
    for n in range(9):
        apart = np.abs(images.read(n).astype(int) - picture(n))
        assert apart.max() == 0 if mode == "raw" else apart.mean() < 5


def test_a_folder_of_splits_under_their_usual_names(tmp_path: Path) -> None:
    fields = [("image", "image"), ("label", "int")]
    write(tmp_path / "train_500_0.50_90.ffcv", fields, 9, "proportion")
    write(tmp_path / "val_500_0.50_90.ffcv", fields, 2, "jpg", first=9)
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.test)) == (9, 2)
    assert data.classes == data.test.classes == ("0", "1", "2")
    (alone,) = open_domains(str(tmp_path / "train_500_0.50_90.ffcv")).values()
    assert len(alone) == 9
    assert len(open_data(str(tmp_path / "train_500_0.50_90.ffcv"), holdout=0.3).test) == 3


def test_two_files_of_a_split_and_splits_of_other_classes_are_refused(tmp_path: Path) -> None:
    fields = [("image", "image"), ("label", "int")]
    for name in ("train_0.beton", "train_1.beton"):
        write(tmp_path / name, fields, 3, "raw")
    with pytest.raises(InputError, match=r"train_0\.beton and train_1\.beton, both of .* 'train'"):
        open_data(str(tmp_path))
    for name in ("train_0.beton", "train_1.beton"):
        (tmp_path / name).unlink()
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    for split, classes in (("train", ["cat", "dog"]), ("val", ["cat", "owl"])):
        images = ArrayImages(split, pixels, np.arange(4) % 2, classes)
        write_beton(images, tmp_path / f"{split}_x.beton")
    with pytest.raises(InputError, match="train of 2 classes and val of 2, 'dog' in one alone"):
        open_data(str(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        [("image", "image"), ("coarse", "int"), ("fine", "int")],
        [("left", "image"), ("right", "image"), ("label", "int")],
        [("image", "image")],
    ],
)
def test_what_is_not_clear_is_refused_with_the_fields(tmp_path: Path, fields: Fields) -> None:
    write(tmp_path / "set.beton", fields, 3, "raw")
    names = ", ".join(name for name, _ in fields)
    with pytest.raises(InputError, match=f"got the fields {names}, expected one image and one int"):
        BetonImages(tmp_path / "set.beton")


def test_a_file_without_samples_and_names_that_cannot_be_printed_are_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "set.beton"
    write(path, [("image", "image"), ("label", "int")], 3, "raw")
    whole = path.read_bytes()
    header = np.frombuffer(whole, beton.HEADER, 1).copy()
    header["samples"] = 0
    path.write_bytes(header.tobytes() + whole[beton.HEADER.itemsize :])
    with pytest.raises(InputError, match="it holds no image"):
        BetonImages(path)
    write(path, [("im\nage", "image"), ("a\x01", "int"), ("b", "int")], 3, "raw")
    with pytest.raises(InputError, match="got the fields") as caught:
        BetonImages(path)
    assert str(caught.value).isprintable() and "im\\nage" in str(caught.value)
