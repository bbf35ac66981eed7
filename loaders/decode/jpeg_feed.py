"""Hand a JPEG to Pillow in three pieces, so that damage shows which Pillow itself passes over.

libjpeg warns of damaged data and goes on with grey or shifted blocks; Pillow does not pass the
warnings on. But its decoder asks for more data as long as the image is not complete. Of a whole
image (ITU-T T.81: one scan, then the mark of its end) the last byte of the scan is needed, and no
bit beyond it is. An image that is complete without that byte has bytes left over, one that still
asks after it has too few: the two warnings that damaged blocks end in.
"""

from __future__ import annotations

import io

from PIL import Image

END = b"\xff\xd9"
PIECE = 2**30  # bytes Pillow may ask for at once: more than a file that is read
MARGIN = bytes(8)  # the decoder reads ahead so many bytes of the scan, whatever they are


class JpegFeed:
    """A file for Pillow's decoder that counts how many pieces it asks for."""

    def __init__(self, data: bytes, end: int) -> None:
        """`end` is the place of the mark that ends the only scan."""
        self._pieces = (data[: end - 1], data[end - 1 : end] + MARGIN, data[end:])
        self.count = 0

    def seek(self, offset: int) -> None:
        """Do nothing: a JPEG is decoded from its first byte."""

    def read(self, size: int) -> bytes:
        """The next piece, whatever its size; nothing after the last."""
        self.count += 1
        return self._pieces[self.count - 1] if self.count <= 3 else b""


def load_jpeg(image: Image.Image, data: bytes) -> None:
    """Decode an open JPEG; raises `ValueError` where its data are damaged.

    Of several scans (progressive JPEGs) only the end is looked at, and of a scan in parts (with
    marks of restart) no part whose damage ends with it.
    """
    if image.info.get("progressive"):
        image.load()
        return
    # The mark of the end is searched only where it is not the file's.
    end = len(data) - 2 if data.endswith(END) else data.find(END, _find_scan(data)[0])
    if end < 0:
        raise ValueError("truncated: the JPEG has no end")
    feed = JpegFeed(data, end)
    image.fp = feed  # type: ignore[attr-defined]
    image.decodermaxblock = PIECE  # type: ignore[attr-defined]
    image.load()
    if feed.count == 2:
        return
    start, colors = _find_scan(data)
    if colors != len(getattr(image, "layer", ())):
        return  # one of several scans
    if (first := data.find(END, start)) != end:  # another image or the like lies behind this one
        with Image.open(io.BytesIO(data[: first + 2]), formats=("JPEG",)) as alone:
            load_jpeg(alone, data[: first + 2])
        return
    few = "ends too early" if feed.count > 2 else "has bytes left over"
    raise ValueError(f"corrupt JPEG data: the scan {few}")


def _find_scan(data: bytes) -> tuple[int, int]:
    """Where the header of the first scan lies, and how many colors are in it."""
    at = 2
    while at + 4 < len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return at, data[at + 4]
        at += 1 if data[at + 1] == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return len(data), 0
