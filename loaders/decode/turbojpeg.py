"""libjpeg-turbo 3 through its TurboJPEG interface: the only one that decodes a part of a JPEG.

Called with ctypes, which lets go of the interpreter's lock, so threads decode side by side.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from letheon.loaders.decode.pillow import pixel_limit

DECOMPRESS = 1  # TJINIT_DECOMPRESS
RGB = 0  # TJPF_RGB
WARNING = 0  # TJERR_WARNING
SUBSAMPLING, WIDTH, HEIGHT, COLORS = 4, 5, 6, 8  # TJPARAM_*
GRAYS_AND_COLORS = (0, 1, 2)  # TJCS_RGB, YCbCr, grey; the others are CMYK
# Columns of the smallest unit that is decoded whole, by TJSAMP_*: 444 422 420 grey 440 411 441.
UNIT_WIDTH = (8, 16, 16, 8, 8, 32, 8)


class _Region(ctypes.Structure):
    _fields_ = tuple((name, c_int) for name in ("x", "y", "w", "h"))


class _Scale(ctypes.Structure):
    _fields_ = (("numerator", c_int), ("denominator", c_int))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, if one of version 3 is there.

    Looked for in the file that LETHEON_TURBOJPEG names, in the system, and in the Python package
    `turbojpeg`, which carries one.
    """
    named = os.environ.get("LETHEON_TURBOJPEG"), ctypes.util.find_library("turbojpeg")
    places = [place for place in named if place]
    package = importlib.util.find_spec("turbojpeg")
    if package is not None and package.origin:
        beside = Path(package.origin).parent / "turbojpeg.libs"
        places += map(str, sorted(beside.glob("libturbojpeg*.so*")))
    for place in places:
        try:
            # Its own libjpeg inside, whatever other one the process has loaded, such as ffcv's.
            lib = ctypes.CDLL(place, os.RTLD_LOCAL | getattr(os, "RTLD_DEEPBIND", 0))
            lib.tj3Init.restype, lib.tj3Init.argtypes = c_void_p, [c_int]
            lib.tj3Destroy.restype, lib.tj3Destroy.argtypes = None, [c_void_p]
            lib.tj3Get.argtypes = [c_void_p, c_int]
            lib.tj3GetErrorCode.argtypes = [c_void_p]
            lib.tj3GetErrorStr.restype, lib.tj3GetErrorStr.argtypes = c_char_p, [c_void_p]
            lib.tj3DecompressHeader.argtypes = [c_void_p, c_void_p, c_size_t]
            lib.tj3SetCroppingRegion.argtypes = [c_void_p, _Region]
            lib.tj3SetScalingFactor.argtypes = [c_void_p, _Scale]
            lib.tj3Decompress8.argtypes = [c_void_p, c_void_p, c_size_t, c_void_p, c_int, c_int]
            return lib
        except (OSError, AttributeError):  # not there, or of an older version
            continue
    return None


class Turbo:
    """A decompressor; not to be shared between threads. Exact: the slow, accurate transforms."""

    def __init__(self) -> None:
        lib = library()
        assert lib is not None
        self._lib = lib
        self._handle = lib.tj3Init(DECOMPRESS)

    def __del__(self) -> None:
        self._lib.tj3Destroy(self._handle)

    def _renew(self) -> None:
        """Take a new handle: one that met a damaged image may keep what it has read."""
        self._lib.tj3Destroy(self._handle)
        self._handle = self._lib.tj3Init(DECOMPRESS)

    def decode(
        self,
        data: NDArray[np.uint8],
        shape: tuple[int, int] | None,
        box: tuple[int, int, int, int] | None = None,
        halvings: int = 0,
    ) -> NDArray[np.uint8] | None:
        """The image, or the part of it in `box` (top, left, height, width), as (h, w, 3) RGB.

        Only the units that the box touches are transformed, and rows below it are not read. With
        `halvings` the result is 2, 4 or 8 times smaller, its box rounded to that grid. None where
        the library fails, meets CMYK, or finds another size than `shape` or one over the cap,
        before anything is decoded; raises `ValueError` with the library's words where it warns.
        """
        lib, handle, length = self._lib, self._handle, len(data)
        start = data.__array_interface__["data"][0]
        lib.tj3SetCroppingRegion(handle, _Region(0, 0, 0, 0))
        if lib.tj3DecompressHeader(handle, start, length):
            self._renew()
            return None
        height, width = lib.tj3Get(handle, HEIGHT), lib.tj3Get(handle, WIDTH)
        sampling = lib.tj3Get(handle, SUBSAMPLING)
        if shape not in (None, (height, width)) or height * width > pixel_limit():
            return None
        if lib.tj3Get(handle, COLORS) not in GRAYS_AND_COLORS:
            return None
        if lib.tj3SetScalingFactor(handle, _Scale(1, 1 << halvings)):
            return None
        # The library rounds a scaled size up.
        height, width = -(-height >> halvings), -(-width >> halvings)
        top, left, h, w = box or (0, 0, height, width)
        if box is not None:
            top, left, h, w = (round(edge / (1 << halvings)) for edge in box)
            h, w = max(h, 1), max(w, 1)
            top, left = min(top, height - h), min(left, width - w)
        first, last = 0, width
        if box is not None and 0 <= sampling < len(UNIT_WIDTH):
            # Colours at the border of a region are interpolated from fewer neighbours than in the
            # whole image: a unit more to the left and a pixel more to the right mend that.
            unit = max(UNIT_WIDTH[sampling] >> halvings, 1)
            first = max(left // unit - 1, 0) * unit
            last = min(left + w + 2, width)
            if lib.tj3SetCroppingRegion(handle, _Region(first, top, last - first, h)):
                return None
        elif box is not None:
            whole = self.decode(data, shape, None, halvings)
            return None if whole is None else whole[top : top + h, left : left + w]
        out = np.empty((h, last - first, 3), dtype=np.uint8)
        place = out.__array_interface__["data"][0]
        if lib.tj3Decompress8(handle, start, length, place, 0, RGB):
            warning = lib.tj3GetErrorCode(handle) == WARNING
            words = lib.tj3GetErrorStr(handle).decode("ascii", "replace")
            self._renew()
            if warning:
                raise ValueError(words)
            return None
        return out[:, left - first : left - first + w]
