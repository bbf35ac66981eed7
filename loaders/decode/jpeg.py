"""JPEG to RGB by the fastest library at hand, whole or a part, with Pillow as the judge.

Fastest first: TurboJPEG 3 on the crop alone, simplejpeg, Pillow. (torchvision and OpenCV lie
between the last two; torchvision's decoder is deprecated.) All of them give Pillow's pixels to the
bit, since all are libjpeg-turbo with its accurate transforms. An image that one of them warns about
is damaged and unreadable; what one of them cannot read at all is left to Pillow.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import threading
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from letheon.loaders.decode import turbojpeg
from letheon.loaders.decode.pillow import decode, pixel_limit, unreadable

Codec = Literal["turbo", "simplejpeg", "pillow"]
Box = tuple[int, int, int, int]  # top, left, height, width
# libjpeg's own words for damage; its other errors are fatal, or not of the data.
_WARNINGS = re.compile(r"Corrupt JPEG|Premature end|Inconsistent progression|Invalid SOS param")
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class _Decoder(Protocol):
    def decode(
        self,
        data: NDArray[np.uint8],
        shape: tuple[int, int] | None,
        box: Box | None = None,
        halvings: int = 0,
    ) -> NDArray[np.uint8] | None: ...


class _Whole:
    """A library that knows whole images only."""

    def __init__(self, function: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
        self._function = function

    def decode(
        self,
        data: NDArray[np.uint8],
        shape: tuple[int, int] | None,
        box: Box | None = None,
        halvings: int = 0,
    ) -> NDArray[np.uint8] | None:
        found = header(data)
        if found is None or found[2] == 4 or found[0] * found[1] > pixel_limit():
            return None
        if shape not in (None, found[:2]):
            return None
        try:
            image = self._function(data)
        except (ValueError, RuntimeError) as error:
            if _WARNINGS.search(str(error)):
                raise ValueError(str(error)) from None
            return None
        top, left, h, w = box or (0, 0, *image.shape[:2])
        return image[top : top + h, left : left + w]


def _by_simplejpeg(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import simplejpeg

    return simplejpeg.decode_jpeg(data)


@functools.cache
def available() -> tuple[Codec, ...]:
    """What is installed, fastest first."""
    there = {
        "turbo": turbojpeg.library() is not None,
        "simplejpeg": importlib.util.find_spec("simplejpeg") is not None,
        "pillow": True,
    }
    return tuple(name for name in get_args(Codec) if there[name])


_local = threading.local()


def _decoder(codec: Codec | None) -> _Decoder | None:
    """This thread's decoder; None stands for Pillow."""
    codec = codec or available()[0]
    if codec == "pillow":
        return None
    kept: dict[str, _Decoder] = _local.__dict__
    if codec not in kept:
        kept[codec] = turbojpeg.Turbo() if codec == "turbo" else _Whole(_by_simplejpeg)
    return kept[codec]


def _try_decoder(
    data: NDArray[np.uint8],
    name: str,
    shape: tuple[int, int] | None,
    box: Box | None,
    halvings: int,
    codec: Codec | None,
) -> NDArray[np.uint8] | None:
    """What this thread's decoder makes of the image; None where that is for Pillow to say.

    Raises:
        UnreadableImage: The decoder warned of damage.
    """
    decoder = _decoder(codec)
    try:
        return None if decoder is None else decoder.decode(data, shape, box, halvings)
    except ValueError as error:
        raise unreadable(name, str(error)) from None


def header(data: NDArray[np.uint8]) -> tuple[int, int, int] | None:
    """Height, width and number of colours, read from the frame's header; None if there is none."""
    start = bytes(data[:2])
    if start != b"\xff\xd8":
        return None
    at, end = 2, len(data)
    while at + 9 < end:
        mark = bytes(data[at : at + 10])
        if mark[0] != 0xFF:
            return None
        if mark[1] in _START_OF_FRAME:
            return mark[5] << 8 | mark[6], mark[7] << 8 | mark[8], mark[9]
        alone = mark[1] == 0xFF or mark[1] == 0x01 or 0xD0 <= mark[1] <= 0xD8
        at += 1 if mark[1] == 0xFF else 2 if alone else 2 + (mark[2] << 8 | mark[3])
    return None


def pixels(
    data: NDArray[np.uint8],
    name: str,
    shape: tuple[int, int] | None = None,
    codec: Codec | None = None,
) -> NDArray[np.uint8]:
    """(H, W, 3) RGB uint8 of a JPEG, or of any other format that Pillow knows.

    Raises:
        UnreadableImage: As `decode`, or the image is not of `shape`.
    """
    image = _try_decoder(data, name, shape, None, 0, codec)
    if image is not None:
        return image
    image = decode(bytes(data), name)
    if shape not in (None, image.shape[:2]):
        raise unreadable(name, f"{image.shape[0]} x {image.shape[1]} pixels, not {shape}")
    return image


def crop(
    data: NDArray[np.uint8],
    name: str,
    box: Box,
    shape: tuple[int, int] | None = None,
    at_least: int = 0,
    codec: Codec | None = None,
) -> NDArray[np.uint8]:
    """The pixels of `box` (top, left, height, width) of an image; see `pixels`.

    With `at_least` the result may be 2, 4 or 8 times smaller than the box, its border rounded to
    that grid, where no side falls below `at_least`: the JPEG is then decoded at that scale, which
    averages squares of pixels. Only TurboJPEG does so.
    """
    top, left, h, w = box
    # A file cut short ends without its mark, and rows below the box are never looked at.
    if bytes(data[-2:]) == b"\xff\xd9":
        halvings = 0
        while at_least and halvings < 3 and min(h, w) >> (halvings + 1) >= at_least:
            halvings += 1
        part = _try_decoder(data, name, shape, box, halvings, codec)
        if part is not None:
            return part
    return pixels(data, name, shape, codec)[top : top + h, left : left + w]
