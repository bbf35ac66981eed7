"""One encoded photograph to RGB bytes, or an error that names it."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from letheon.errors import UnreadableImage

MAX_PIXELS = 2**26  # 67 million: over any photograph of the usual sets, under 0.3 GB decoded


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """(H, W, 3) RGB uint8 from any format that Pillow knows, whatever the file's suffix says.

    Grey, palette, CMYK and transparent images are converted; the orientation tag is not applied, as
    is usual for these sets. Nothing is decoded before the stated size has passed the cap.

    Raises:
        UnreadableImage: Empty, truncated, not an image, or more than `max_pixels`; `name` is in it.
    """
    if not data:
        raise unreadable(name, "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, softer caps and broken metadata
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise unreadable(name, f"{width} x {height} pixels, over {max_pixels}")
                return np.array(image.convert("RGB"))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise unreadable(name, "no known image format") from None
    except Exception as error:  # Pillow's plugins raise many kinds on broken files
        reason = " ".join(str(error).split())
        raise unreadable(name, reason or type(error).__name__) from None


def unreadable(name: str, reason: str) -> UnreadableImage:
    """The error for an image that is not what it should be."""
    return UnreadableImage(
        f"{name}: got an unreadable image ({reason}), expected a whole one; replace or remove it, "
        "or run prepare, which leaves such files out and lists them"
    )
