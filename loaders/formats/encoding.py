"""Whether an image goes into a `.beton` file, and as which bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from letheon.errors import InputError, UnreadableImage
from letheon.kernels import keyed
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.decode import jpeg
from letheon.loaders.decode.pillow import MAX_PIXELS, decode, open_image

MAX_SIDE = 2**16 - 1  # the table keeps sides in 16 bits
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Encoding:
    """How images are kept."""

    max_side: int | None = None
    """Pixels that longer sides are reduced to, by area averaging as ffcv does; None keeps all."""
    quality: int = 90
    """Quality of the JPEGs that are encoded anew; those that can stay as they are, do."""
    raw: float = 0.0
    """Share of the images kept as pixels, chosen by (seed, number in the source set)."""
    seed: int = 0
    """Seed of that choice."""
    page: int = 2**23
    """Bytes of a page, a power of two from 2 MiB; no image can be larger in the file."""
    max_pixels: int = MAX_PIXELS
    """Pixels from which on an image is refused before it is decoded."""

    def __post_init__(self) -> None:
        bounds = (
            ("max_side", self.max_side is None or 1 <= self.max_side <= MAX_SIDE, "1..65535"),
            ("quality", 1 <= self.quality <= 100, "1..100"),
            ("raw", 0 <= self.raw <= 1, "a share in 0..1"),
            ("page", 2**21 <= self.page < 2**32 and self.page.bit_count() == 1, "2**21..2**31"),
            ("max_pixels", self.max_pixels >= 1, "at least 1"),
        )
        for name, holds, wanted in bounds:
            if not holds:
                raise InputError(
                    f"got {name} {getattr(self, name)}, expected {wanted}; change the option"
                )


class Admitted(NamedTuple):
    """An image as it will lie in the file."""

    data: bytes
    height: int
    width: int
    raw: bool
    remarks: tuple[str, ...]  # counted in the manifest


def admit(images: ImageSet, i: int, encoding: Encoding) -> Admitted:
    """Decode image i once, to be sure of it, and encode it where it cannot stay as it is.

    Raises:
        UnreadableImage: It is unreadable, over the cap, or over a page in any form; it is named.
    """
    remarks: list[str] = []
    original: bytes | None = None
    if isinstance(images, FileImages):
        original = images.file_bytes(i)
        pixels = _pixels(original, images.path(i), encoding.max_pixels)
        kind = _inspect(original, images.file(i), remarks)
        if kind != ("JPEG", 1) and kind != ("JPEG", 3):
            original = None
    else:
        pixels = images.read(i)
    height, width = pixels.shape[:2]
    if encoding.max_side is not None and max(height, width) > encoding.max_side:
        pixels, original = shrink(pixels, encoding.max_side), None
        remarks.append("resized")
        height, width = pixels.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise _refuse(images, i, f"a side of {max(height, width)} pixels, over {MAX_SIDE}")
    if _wants_raw(i, encoding):
        if pixels.nbytes <= encoding.page:
            return Admitted(pixels.tobytes(), height, width, True, (*remarks, "raw"))
        remarks.append("too large for raw")
    if original is not None and len(original) <= encoding.page:
        return Admitted(original, height, width, False, (*remarks, "passed through"))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=encoding.quality)
    if buffer.tell() > encoding.page:
        raise _refuse(images, i, f"{buffer.tell()} bytes, over a page of {encoding.page}")
    return Admitted(buffer.getvalue(), height, width, False, (*remarks, "encoded"))


def _pixels(data: bytes, name: str, max_pixels: int) -> NDArray[np.uint8]:
    """(H, W, 3) by the decoder of every loader, so that damage is the same for all of them."""
    encoded = np.frombuffer(data, np.uint8)
    size = jpeg.header(encoded)
    if size is None or size[0] * size[1] > max_pixels:
        return decode(data, name, max_pixels)  # the cap applies before anything is decoded
    return jpeg.pixels(encoded, name)


def _inspect(data: bytes, name: str, remarks: list[str]) -> tuple[str, int]:
    """Format and number of colours of an image that is known to decode; oddities are noted."""
    with open_image(data) as image:
        kind, bands = str(image.format), len(image.getbands())
        if image.mode == "CMYK":
            remarks.append("CMYK converted")
        elif image.mode == "L":
            remarks.append("grey")
        try:
            turned = image.getexif().get(ORIENTATION, 1) != 1
        except Exception:  # broken metadata of a good image
            turned = False
        if turned:
            remarks.append("EXIF rotation ignored")
    if kind != "JPEG":
        suffix = name.rpartition(".")[2].lower()
        remarks.append(f"{kind} named {suffix}" if suffix in ("jpg", "jpeg") else f"from {kind}")
    return kind, bands


def shrink(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The image with its longer side made `side` long by area averaging."""
    height, width = pixels.shape[:2]
    longer = max(height, width)
    # The shorter side is cut to whole pixels, as ffcv does.
    size = max(1, side * width // longer), max(1, side * height // longer)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _wants_raw(i: int, encoding: Encoding) -> bool:
    draw = keyed.uniform(encoding.seed, "raw", 0, torch.tensor([i]), 1)
    return bool(draw.item() < encoding.raw)


def _refuse(images: ImageSet, i: int, reason: str) -> UnreadableImage:
    return UnreadableImage(
        f"{images.path(i)}: got {reason}, expected a smaller image; give a max side or larger pages"
    )
