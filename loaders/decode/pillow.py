"""One encoded photograph to RGB bytes, or an error that names it."""

from __future__ import annotations

import functools
import io
import os
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from letheon.errors import InputError, UnreadableImage
from letheon.loaders.decode.jpeg_feed import load_jpeg

DEEP_FORMATS = ("PNG", "PPM")  # in which Pillow's 32-bit mode holds 16-bit values
JPEG = b"\xff\xd8"
PNG = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 2**26  # 67 million: over any photograph of the usual sets, under 0.3 GB decoded
# What is decoded, by content and whatever the suffix. Pillow knows more, among them EPS, for which
# it starts Ghostscript.
FORMATS = (
    "JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000",
    *(("AVIF",) if features.check("avif") else ()),
)  # fmt: skip


@functools.cache
def pixel_limit() -> int:
    """Most pixels of an image that is decoded: `MAX_PIXELS`, or what LETHEON_MAX_PIXELS says.

    Raises:
        InputError: the variable is no number above 0.
    """
    text = os.environ.get("LETHEON_MAX_PIXELS", str(MAX_PIXELS))
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**40):
        raise InputError(
            f"got LETHEON_MAX_PIXELS={text}; expected a number of pixels above 0; mend or unset it"
        )
    return int(text)


def open_image(data: bytes) -> Image.Image:
    """An image of one of `FORMATS`, its header read and nothing decoded; Pillow's errors."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decode(data: bytes, name: str, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) RGB uint8 of any of `FORMATS`, whatever the file's suffix says.

    Converted as by `to_rgb`; the orientation tag is not applied, as is usual for these sets.
    Nothing is decoded before the stated size has passed the cap. Texts in a PNG are not read.

    Raises:
        UnreadableImage: Empty, truncated, damaged, not an image, or more than `max_pixels`
            (by default `pixel_limit`); `name` is in it.
    """
    if not data:
        raise unreadable(name, "0 bytes")
    limit = max_pixels or pixel_limit()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, softer caps and broken metadata
            with open_image(data) as image:
                width, height = image.size
                if width * height > limit:
                    raise unreadable(name, f"{width} x {height} pixels, over {limit}")
                if data.startswith(JPEG):
                    load_jpeg(image, data)
                return to_rgb(image, name)
    except UnreadableImage:
        raise
    except ValueError as error:
        shorter = _drop_texts(data)
        if len(shorter) < len(data):  # Pillow refuses a PNG whose texts are long
            return decode(shorter, name, max_pixels)
        raise unreadable(name, " ".join(str(error).split()) or "ValueError") from None
    except UnidentifiedImageError:
        raise unreadable(name, f"no known image format: {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plugins raise many kinds on broken files
        reason = " ".join(str(error).split())
        raise unreadable(name, reason or type(error).__name__) from None


def to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of an open image: grey, palette, CMYK and transparent ones are converted.

    Of 16-bit grey the high byte is kept, as of 16-bit colors.

    Raises:
        UnreadableImage: Grey of 32 bits or floating point, whose white is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in DEEP_FORMATS):
        grey = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise unreadable(name, f"grey values of mode {image.mode}, whose white is not known")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _drop_texts(data: bytes) -> bytes:
    """A PNG without its chunks of text and color profile; other data as they are."""
    if data[:8] != PNG:
        return data
    parts, at = [PNG], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def unreadable(name: str, reason: str) -> UnreadableImage:
    """The error for an image that is not what it should be."""
    return UnreadableImage(
        f"{name}: got an unreadable image ({reason}), expected a whole one; replace or remove it, "
        "or run prepare, which leaves such files out and lists them"
    )
