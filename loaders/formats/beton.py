"""The `.beton` file, version 2: the format of the ffcv package, read with numpy alone.

Little-endian, in this order (written down from files that ffcv 1.0 made, and checked both ways
against that package in the tests):

    header      24 bytes: version, fields, page size, samples, place of the allocation table
    fields      1041 bytes each: type, name, arguments
    table       one row per sample; an image is (mode, width, height, pointer) in 13 bytes
    pages       the blobs; none lies across a page's edge
    allocation  (sample, pointer, size) per blob, in any order

A file of ours has a manifest beside it with the class names, digests and the list of what was left
out. What is not an image (head, table, allocation) is verified when the file is opened, an image
when it is first read. A file without a manifest is read too; its classes are called "0", "1", ...
"""

from __future__ import annotations

import csv
import hashlib
import mmap
import os
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError, UnreadableImage
from letheon.loaders.datasets.image_set import ImageSet, number_classes
from letheon.loaders.decode.encoded_image import EncodedImage
from letheon.loaders.decode.pillow import unreadable
from letheon.loaders.formats.arrays import DAMAGE, UNVERIFIED, check_format, texts
from letheon.loaders.formats.pieces import PieceDigests
from letheon.regular import open_regular
from letheon.sealed import SEAL, expect_shape, read_sealed

FORMAT = "letheon-beton-2"
UNSEALED = "letheon-beton-1"  # of versions whose digests were not verified

VERSION = 2
JPEG, RAW = 0, 1
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
BLOB = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
# By ffcv's numbers: float, int, image, bytes, array, JSON, tensor.
_ROW_TYPES = {
    0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE, 3: np.dtype("<u8, <u8"),
    4: np.dtype("<u8"), 5: np.dtype("<u8, <u8"), 6: np.dtype("<u8"),
}  # fmt: skip
LABELS = ("label", "labels", "target", "targets", "class", "y")  # of several integers, the label
INT_FIELD, IMAGE_FIELD = 1, 2


def manifest_path(path: Path) -> Path:
    """Where the manifest of a `.beton` file lies."""
    return path.with_name(path.name + ".json")


def digests_path(path: Path) -> Path:
    """Where the digests of the blobs of a `.beton` file lie."""
    return path.with_name(path.name + ".digests")


def index_digest(content: Any, table_end: int, pages_end: int) -> str:
    """SHA-256 in hex of what is no image: the bytes up to `table_end`, and from `pages_end` on."""
    view = memoryview(content)
    total = hashlib.sha256(view[:table_end])
    total.update(view[pages_end:])
    return total.hexdigest()


def listing_path(path: Path) -> Path:
    """Where the list of samples of a `.beton` file lies: a line for each, in order."""
    return path.with_name(path.name + ".samples.csv")


class BetonImages(ImageSet):
    """The images of one `.beton` file, mapped into memory; a row of the table is a sample.

    The tables stay on disk until they are asked for, so opening a million samples costs the
    labels (8 MB) and, where the blobs are not in order, one more number for each. Pickled by path.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises `InputError`: not a version 2 file, cut short, or without image and label."""
        self.file = Path(path)
        self._map, header, fields = _map_file(self.file)
        types = fields["type"].tolist()
        self.image_field, label = _choose_fields(self.file, fields)
        row = np.dtype([(f"f{k}", _ROW_TYPES[kind]) for k, kind in enumerate(types)], align=True)
        n, start = int(header["samples"]), HEADER.itemsize + fields.nbytes
        end = int(header["table"])
        if not n:
            raise _broken(self.file, "it holds no image")
        if start + n * row.itemsize > len(self._map) or not start <= end <= len(self._map):
            raise _broken(self.file, "its table ends after the file")
        rows = np.frombuffer(self._map, row, n, start)
        self.table: NDArray[Any] = rows[f"f{self.image_field}"]  # (N,) of `IMAGE`
        self.labels = rows[f"f{label}"].astype(np.int64)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._blobs = np.frombuffer(self._map, BLOB, (len(self._map) - end) // BLOB.itemsize, end)
        self._pieces: PieceDigests | None = None
        self.name = self.file.name.removesuffix(".beton")
        self.manifest = _read_manifest(self.file, n, len(self._map))
        if self.manifest:
            self.name, self.classes = self.manifest["name"], tuple(self.manifest["classes"])
            self._open_digests(start + n * row.itemsize, end)
        else:
            self.classes = number_classes(int(self.labels.max()), self.file)
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise _broken(self.file, f"a label is outside the {len(self.classes)} classes")

    def _open_digests(self, table_end: int, pages_end: int) -> None:
        """Verify what is no image, and map the digests of the images."""
        if SEAL not in self.manifest:
            self.notes = (UNVERIFIED.format(self.file),)
            return
        if index_digest(self._map, table_end, pages_end) != self.manifest.get("index"):
            raise _broken(self.file, "its table is not as it was written, by its digest")
        pieces = str(self.manifest.get("pieces"))
        self._pieces = PieceDigests(digests_path(self.file), len(self), pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        return BetonImages, (self.file,)

    @cached_property
    def digest(self) -> str:
        """The manifest's, over every sample's bytes, label and class; else over the whole file."""
        if self.manifest:
            return str(self.manifest["digest"])
        with open(self.file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def _order(self) -> NDArray[np.int64] | None:
        """Rows of the allocation table by pointer; None where blob k is sample k's."""
        here, told = self._blobs["pointer"], self.table["pointer"]
        if len(here) == len(told) and np.array_equal(here, told):
            return None
        return np.argsort(here)

    def _extents(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pointers = self.table["pointer"][indices]
        found: NDArray[Any] = indices
        if not len(self._blobs):
            raise _broken(self.file, "a sample points to no blob")
        if self._order is not None:
            at = np.searchsorted(self._blobs["pointer"], pointers, sorter=self._order)
            found = self._order[np.minimum(at, len(self._order) - 1)]
        if not np.array_equal(self._blobs["pointer"][found], pointers):
            raise _broken(self.file, "a sample points to no blob")
        sizes = self._blobs["size"][found]
        whole = len(self._bytes)
        if len(sizes) and ((pointers > whole) | (sizes > whole) | (pointers + sizes > whole)).any():
            raise _broken(self.file, "a blob ends after the file")
        return pointers.astype(np.int64), sizes.astype(np.int64)

    def read_encoded(self, indices: NDArray[np.int64]) -> list[EncodedImage | UnreadableImage]:
        """The images as they lie in the file, without a copy, or why one is damaged.

        Raises:
            InputError: The file is cut short.
        """
        starts, sizes = self._extents(indices)
        numbers, rows = indices.tolist(), self.table[indices]
        places = zip(numbers, starts.tolist(), sizes.tolist(), strict=True)
        blobs = {i: self._bytes[start : start + size] for i, start, size in places}
        pieces = self._pieces
        damage = pieces.find_damage(indices, blobs.__getitem__) if pieces is not None else ()
        return [
            unreadable(self.path(i), DAMAGE)
            if i in damage
            else EncodedImage(blobs[i], height, width, mode == RAW, self.path(i))
            for i, mode, height, width in zip(
                numbers,
                rows["mode"].tolist(),
                rows["height"].tolist(),
                rows["width"].tolist(),
                strict=True,
            )
        ]

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Ask the system to read these blobs ahead; nothing is waited for."""
        starts, sizes = self._extents(indices)
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, max(1, start + size - first))

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i decoded; a copy. Raises `InputError` naming it."""
        return self.read_many(np.array([i]))[0]

    def read_many(self, indices: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The images of `indices`, each (H, W, 3)."""
        found = self.read_encoded(indices)
        return [_intact(one).pixels() for one in found]

    def path(self, i: int) -> str:
        """The file and the sample's number in it."""
        return f"{self.file}[{i}]"

    def source(self, i: int) -> str:
        """What image i was called where it came from; "" where there is no list of samples."""
        beside = listing_path(self.file)
        if not beside.is_file():
            return ""
        with open(beside, newline="", encoding="utf-8", errors="surrogateescape") as file:
            row = next(islice(csv.DictReader(file), i, None), {})
            return str(row.get("path", ""))


def _choose_fields(path: Path, fields: NDArray[Any]) -> tuple[int, int]:
    """The numbers of the fields of the image and of the label; raises `InputError` if not clear."""
    names = [name.decode("ascii", "replace") for name in fields["name"].tolist()]
    types = fields["type"].tolist()
    images = [k for k, kind in enumerate(types) if kind == IMAGE_FIELD]
    labels = [k for k, kind in enumerate(types) if kind == INT_FIELD]
    labels = [k for name in LABELS for k in labels if names[k].lower() == name][:1] or labels
    if len(images) != 1 or len(labels) != 1 or not set(types) <= set(_ROW_TYPES):
        shown = (name if name.isprintable() else repr(name) for name in names)
        raise InputError(
            f"{path}: got the fields {', '.join(shown)}, expected one image and one integer, "
            f"or of several one called {LABELS[0]}; write the file with these"
        )
    return images[0], labels[0]


def _intact(one: EncodedImage | UnreadableImage) -> EncodedImage:
    if isinstance(one, UnreadableImage):
        raise one
    return one


def _read_manifest(path: Path, samples: int, size: int) -> dict[str, Any]:
    """The manifest of the file at `path`, of so many samples and bytes; empty if there is none."""
    beside = manifest_path(path)
    if not beside.is_file():
        return {}
    manifest = read_sealed(beside)
    with expect_shape(beside):
        count = int(manifest["samples"])
        if count != samples or manifest["file"]["bytes"] != size:
            raise _broken(beside, f"it tells of {count} samples in another file")
        for text in (*texts(manifest["classes"]), manifest["name"], manifest["digest"]):
            if not isinstance(text, str):
                raise TypeError("a name that is no text")
    check_format(beside, manifest, FORMAT, UNSEALED)
    return manifest


def is_beton(path: Path) -> bool:
    """Whether the file starts as ffcv's do: version, fields, a page of a power of two."""
    with open_regular(path) as file:
        start = file.read(HEADER.itemsize)
    if len(start) < HEADER.itemsize:
        return False
    head = np.frombuffer(start, HEADER, 1)[0]
    page = int(head["page"])
    return head["version"] == VERSION and 1 <= head["fields"] <= 64 and page.bit_count() == 1


def _map_file(path: Path) -> tuple[mmap.mmap, Any, NDArray[Any]]:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER.itemsize:
                raise _broken(path, f"{size} bytes")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(
            f"got {path}, which cannot be read ({error.strerror}), expected a .beton file; "
            "check the path"
        ) from None
    header = np.frombuffer(mapped, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise InputError(
            f"{path}: got version {header['version']}, expected a .beton file of version "
            f"{VERSION}; write it again"
        )
    count = int(header["fields"])
    if HEADER.itemsize + count * FIELD.itemsize > size:
        raise _broken(path, "its header ends after the file")
    return mapped, header, np.frombuffer(mapped, FIELD, count, HEADER.itemsize)


def _broken(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: got a broken file ({reason}), expected a whole .beton file; prepare it again"
    )
