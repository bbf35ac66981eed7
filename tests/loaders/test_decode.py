"""Dirty images: what is read all the same, and what is refused by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from letheon.errors import InputError
from letheon.loaders.decode.pillow import decode


def encoded(mode: str, form: str, size: tuple[int, int] = (20, 14)) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(out, format=form)
    return out.getvalue()


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        *[(mode, "JPEG") for mode in ("RGB", "CMYK", "L")],
        *[(mode, "PNG") for mode in ("RGB", "P", "1", "RGBA", "LA")],
        *[("RGB", "BMP"), ("P", "GIF"), ("RGB", "WEBP")],
    ],
)
def test_modes_and_formats_become_rgb_whatever_the_suffix(mode: str, form: str) -> None:
    image = decode(encoded(mode, form), "photo.JPEG")
    assert image.shape == (14, 20, 3) and image.dtype == np.uint8
    rows = image.mean(axis=(1, 2))
    assert rows[-3:].mean() > rows[:3].mean() + 60  # still the gradient, dark to bright


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"\0" * 500, "no known image format"),
        (b"<html>not found</html>", "no known image format"),
        (encoded("RGB", "JPEG", (200, 200))[:900], "truncated"),
        (encoded("RGB", "PNG", (200, 200))[:-60], "truncated|broken"),
    ],
)
def test_unreadable_files_are_named_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(
        InputError, match=rf"^a/b\.jpg: got an unreadable image \(.*({reason})"
    ) as e:
        decode(data, "a/b.jpg")
    assert "\n" not in str(e.value)


def test_the_cap_on_pixels_applies_before_decoding() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(InputError, match=r"bomb\.png.*pixels"):
        decode(bomb, "bomb.png")
    small = encoded("RGB", "PNG", (20, 14))
    assert decode(small, "x", max_pixels=280).shape == (14, 20, 3)
    with pytest.raises(InputError, match="20 x 14 pixels, over 279"):
        decode(small, "x", max_pixels=279)
