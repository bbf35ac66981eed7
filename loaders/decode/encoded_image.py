"""Images as they are kept, not yet decoded, for the loaders that decode by themselves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from letheon.loaders.decode import jpeg
from letheon.loaders.decode.pillow import decode, unreadable


class EncodedImage(NamedTuple):
    """One image as it is kept."""

    data: NDArray[np.uint8]  # (bytes,)
    height: int
    width: int
    raw: bool  # height x width x 3 RGB bytes; else a JPEG
    name: str  # for messages

    def pixels(self, codec: jpeg.Codec | None = None) -> NDArray[np.uint8]:
        """(H, W, 3), a copy. Raises `UnreadableImage` naming the image."""
        if self.raw:
            return self._view().copy()
        return jpeg.pixels(self.data, self.name, (self.height, self.width), codec)

    def crop(
        self, box: jpeg.Box, at_least: int = 0, codec: jpeg.Codec | None = None
    ) -> NDArray[np.uint8]:
        """The pixels of `box`; see `jpeg.crop` for `at_least`. Raises `UnreadableImage`."""
        if self.raw:
            top, left, h, w = box
            return self._view()[top : top + h, left : left + w].copy()
        shape = (self.height, self.width)
        return jpeg.crop(self.data, self.name, box, shape, at_least, codec)

    def _view(self) -> NDArray[np.uint8]:
        if len(self.data) != self.height * self.width * 3:
            raise unreadable(self.name, "its raw bytes do not fit its size")
        return self.data.reshape(self.height, self.width, 3)


def from_file(data: bytes, name: str) -> EncodedImage:
    """The JPEG in `data`; any other format is decoded at once. Raises `UnreadableImage`."""
    encoded = np.frombuffer(data, dtype=np.uint8)
    found = jpeg.header(encoded)
    if found is not None and found[2] != 4:
        return EncodedImage(encoded, found[0], found[1], False, name)
    return from_pixels(decode(data, name), name)


def from_pixels(pixels: NDArray[np.uint8], name: str) -> EncodedImage:
    """An image that is (H, W, 3) already."""
    height, width, _ = pixels.shape
    return EncodedImage(np.ascontiguousarray(pixels).reshape(-1), height, width, True, name)
