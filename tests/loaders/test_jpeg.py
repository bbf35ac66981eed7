"""The JPEG libraries against Pillow, whole and in part."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from letheon.errors import InputError
from letheon.loaders.decode import jpeg

Bytes = NDArray[np.uint8]


def picture(height: int = 83, width: int = 121) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options: Any) -> Bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, **options)
    return np.frombuffer(out.getvalue(), np.uint8)


def truth(data: Bytes) -> Bytes:
    return np.array(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


VARIANTS = [
    *[("RGB", {"subsampling": s, "progressive": p}) for s in (0, 1, 2) for p in (False, True)],
    ("L", {}),
    ("CMYK", {}),
]


@pytest.mark.parametrize("codec", jpeg.available())
@pytest.mark.parametrize(("mode", "options"), VARIANTS)
def test_whole_images_and_every_crop_are_pillows_to_the_bit(
    codec: jpeg.Codec, mode: str, options: dict[str, Any]
) -> None:
    data = encoded(picture().convert(mode), **options)
    image = truth(data)
    assert np.array_equal(jpeg.pixels(data, "x", (83, 121), codec), image)
    rng = np.random.default_rng(1)
    for _ in range(25):
        h, w = int(rng.integers(1, 84)), int(rng.integers(1, 122))
        top, left = int(rng.integers(0, 84 - h)), int(rng.integers(0, 122 - w))
        part = jpeg.crop(data, "x", (top, left, h, w), (83, 121), codec=codec)
        assert np.array_equal(part, image[top : top + h, left : left + w])


def test_a_large_crop_may_come_at_half_size_and_is_then_near_the_mean_of_squares() -> None:
    data = encoded(picture(400, 400))
    box = (40, 60, 320, 300)
    whole = jpeg.crop(data, "x", box)
    small = jpeg.crop(data, "x", box, at_least=140)
    assert whole.shape == (320, 300, 3)
    if jpeg.available()[0] != "turbo":
        assert np.array_equal(small, whole)
        return
    assert small.shape == (160, 150, 3)
    means = whole.reshape(160, 2, 150, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - means).mean() < 1
    assert jpeg.crop(data, "x", box, at_least=151).shape == whole.shape


def test_header_is_read_without_decoding() -> None:
    assert jpeg.header(encoded(picture())) == (83, 121, 3)
    assert jpeg.header(encoded(picture().convert("L"))) == (83, 121, 1)
    assert jpeg.header(encoded(picture().convert("CMYK"))) == (83, 121, 4)
    assert jpeg.header(np.zeros(50, np.uint8)) is None
    assert jpeg.header(encoded(picture())[:100]) is None


def grown(data: Bytes, height: int, width: int) -> Bytes:
    """The same JPEG with another size written in its frame's header."""
    out = data.copy()
    at = data.tobytes().index(b"\xff\xc0")
    out[at + 5 : at + 9] = height >> 8, height & 255, width >> 8, width & 255
    return out


@pytest.mark.parametrize("codec", jpeg.available())
def test_broken_images_are_named_and_nothing_large_is_decoded(codec: jpeg.Codec) -> None:
    good = encoded(picture())
    broken = {
        "cut": good[: len(good) // 2],
        "empty": good[:0],
        "zeros": np.zeros(5000, np.uint8),
        "bomb": grown(good, 60000, 60000),
    }
    for name, data in broken.items():
        with pytest.raises(InputError, match=f"^{name}: .*unreadable"):
            jpeg.pixels(data, name, codec=codec)
        with pytest.raises(InputError, match=f"^{name}: "):
            jpeg.crop(data, name, (0, 0, 8, 8), codec=codec)
    with pytest.raises(InputError, match="x: .*not \\(10, 10\\)"):
        jpeg.pixels(good, "x", (10, 10), codec=codec)


def damaged(data: Bytes) -> dict[str, Bytes]:
    """The JPEG with its second half in ways that Pillow alone reads without a word."""
    raw, half = data.tobytes(), len(data) // 2
    scan = raw.index(b"\xff\xda") + 14
    forms = {
        "zeros": raw[:half] + bytes(len(raw) - half - 2) + raw[-2:],
        "gone": raw[:half] + raw[-2:],
        "twice": raw[: half + 300] + raw[half:],
        "end lost": raw[:-2],
        "mark": raw[: scan + 200] + b"\xff\xc8" + raw[scan + 202 :],
        "more": raw[:-2] + bytes(40) + raw[-2:],
    }
    return {name: np.frombuffer(form, np.uint8) for name, form in forms.items()}


@pytest.mark.parametrize("codec", jpeg.available())
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_blocks": 4}])
def test_what_libjpeg_warns_about_is_unreadable(codec: jpeg.Codec, options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (83, 121, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), **options)
    assert np.array_equal(jpeg.pixels(data, "x", codec=codec), truth(data))
    for name, form in damaged(data).items():
        if (name, codec) == ("twice", "pillow") and "restart_marker_blocks" in options:
            continue  # within a part that ends by itself, which Pillow does not tell
        with pytest.raises(InputError, match=f"^{name}: .*unreadable"):
            jpeg.pixels(form, name, codec=codec)


@pytest.mark.parametrize("codec", jpeg.available())
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (8, 8), (17, 3), (64, 16)])
@pytest.mark.parametrize(
    "kind", ["plain", "grey", "flat", "restarts", "progressive", "CMYK", "exif"]
)
def test_whole_images_of_every_kind_are_not_damaged(
    codec: jpeg.Codec, size: tuple[int, int], kind: str
) -> None:
    image = picture(*size).convert({"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
    if kind == "flat":
        image = Image.new("RGB", image.size, (255, 255, 255))
    options: dict[str, Any] = {"optimize": kind == "flat", "progressive": kind == "progressive"}
    if kind == "restarts":
        options["restart_marker_blocks"] = 1
    if kind == "exif":  # a small picture inside is no part of the image
        options["exif"] = b"Exif\0\0" + encoded(picture(20, 30)).tobytes()
    data = encoded(image, **options)
    for form in (data, *(np.concatenate([data, end]) for end in (np.zeros(9, np.uint8), data))):
        assert np.array_equal(jpeg.pixels(form, "x", codec=codec), truth(data))


def test_other_formats_and_trailing_bytes_are_read(tmp_path: Any) -> None:
    out = io.BytesIO()
    picture().save(out, "PNG")
    png = np.frombuffer(out.getvalue(), np.uint8)
    assert np.array_equal(jpeg.pixels(png, "x"), np.asarray(picture()))
    good = encoded(picture())
    longer = np.concatenate([good, np.zeros(100, np.uint8)])
    assert np.array_equal(jpeg.crop(longer, "x", (3, 4, 50, 60)), truth(good)[3:53, 4:64])
