"""A checked set on disk: every image was opened once, the unreadable ones are listed and left out.

With a size, the images are decoded to one array that is mapped into memory; without, only the
list of good files is kept and the photographs are decoded when read.

    set.json               kind, classes, names, source, the digests of each part; sealed
    quarantine.csv         file, reason
    <part>/images.npy      (N, size, size, 3) uint8   }
    <part>/labels.npy      (N,) int64                 } with a size
    <part>/images.digests  16 bytes a piece of images }
    <part>/files.csv       path, label, bytes, SHA-256  without

Labels and list are verified when the set is opened, pixels and files when they are first read.
"""

from __future__ import annotations

import csv
import hashlib
import io
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.loaders.datasets.archives import open_tree
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ArrayImages, Data, ImageSet
from letheon.loaders.datasets.tree import Tree
from letheon.loaders.decode.pillow import unreadable
from letheon.loaders.formats.pieces import BYTES, PIECE, PieceDigests, load_array, piece_digest
from letheon.regular import read_regular
from letheon.sealed import SEAL, read_sealed

FORMAT = "letheon-set-2"
UNSEALED = "letheon-set-1"  # of versions that wrote no digest that can be verified
UNVERIFIED = (
    "{}: prepared by a version that noted no digests, so its bytes are not verified when they are "
    "read; prepare it again to have that"
)
COLUMNS = ["path", "label", "bytes", "sha256"]  # of files.csv
LARGEST_LIST = 2**31  # bytes of files.csv; a million images need 0.1 GB
DAMAGE = "its bytes are not those that were prepared, by their digest"


class MappedImages(ArrayImages):
    """A prepared part; pickled by its place, so workers map the file instead of copying it."""

    def __init__(self, folder: Path, part: dict[str, Any], classes: Sequence[str]) -> None:
        """`part` is the part's entry in the set's page; without pieces nothing is verified.

        Raises:
            InputError: a file is missing, or is not of the part.
        """
        labels = load_array(folder / "labels.npy")
        pixels = load_array(folder / "images.npy")
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise InputError(
                f"{folder / 'labels.npy'}: got {labels.dtype} of shape {labels.shape}, expected "
                "one int64 an image; prepare the set again"
            )
        labels = np.array(labels)
        if "pieces" in part and hashlib.sha256(labels.tobytes()).hexdigest() != part["labels"]:
            raise InputError(
                f"{folder / 'labels.npy'}: got labels that are not those that were prepared, by "
                "their digest, expected these; prepare the set again"
            )
        super().__init__(str(part["name"]), pixels, labels, classes, str(part.get("digest", "")))
        self._place = folder, part
        self._pieces: PieceDigests | None = None
        self._rows = 1
        if "pieces" in part:
            self._rows = min(max(int(part["rows"]), 1), PIECE)
            count = -(-len(labels) // self._rows)
            self._pieces = PieceDigests(folder / "images.digests", count, part["pieces"])

    def read(self, i: int) -> NDArray[np.uint8]:
        """A view of image i; raises `UnreadableImage` where its bytes are damaged."""
        self._verify(np.array([i]))
        return super().read(i)

    def read_many(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(B, H, W, 3), a copy, gathered at once; raises as `read`."""
        self._verify(indices)
        return super().read_many(indices)

    def _verify(self, indices: NDArray[np.int64]) -> None:
        if self._pieces is None:
            return
        damage = self._pieces.find_damage(indices // self._rows, self._piece)
        if damage:
            first = next(int(i) for i in indices if i // self._rows in damage)
            raise unreadable(f"{self._place[0] / 'images.npy'}[{first}]", DAMAGE)

    def _piece(self, number: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self.pixels[number * self._rows : (number + 1) * self._rows])

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedImages, (*self._place, self.classes)


class VerifiedFiles(FileImages):
    """The files of a prepared list, each compared with its digest when it is first read."""

    def __init__(
        self, part: dict[str, Any], tree: Tree, rows: Iterable[list[str]], classes: Sequence[str]
    ) -> None:
        """`rows` are those of files.csv: path, label, bytes, SHA-256.

        Raises:
            ValueError: a path leads outside, or a label is of none of the classes.
        """
        paths, labels, digests = [], array("q"), bytearray()
        for path, label, _, digest in rows:
            if path.startswith("/") or "\0" in path or ".." in path.split("/"):
                raise ValueError(f"a file {path!r}, which leads outside")
            if not 0 <= int(label) < len(classes):
                raise ValueError(f"the label {label} of {len(classes)} classes")
            paths.append(path)
            labels.append(int(label))
            digests += bytes.fromhex(digest)[:BYTES]
        root, digest = str(part.get("root", "")), str(part["digest"])
        super().__init__(str(part["name"]), tree, paths, np.array(labels), classes, root, digest)
        self._digests = bytes(digests)
        self._verified = bytearray(len(paths))

    def file_bytes(self, i: int) -> bytes:
        """The content of file i.

        Raises:
            UnreadableImage: it cannot be read.
            InputError: it is not what was prepared, so that the set is another than its record.
        """
        data = super().file_bytes(i)
        if not self._verified[i]:
            if piece_digest(data) != self._digests[i * BYTES : (i + 1) * BYTES]:
                raise InputError(
                    f"{self.path(i)}: got another content than was prepared, by its digest; "
                    "expected the files of the list as they were; put it back, or run prepare again"
                )
            self._verified[i] = 1
        return data


def is_prepared(path: Path) -> bool:
    """Whether `prepare` wrote this folder."""
    return (path / "set.json").is_file()


def open_arrays(path: Path) -> Data | dict[str, ImageSet]:
    """The set that `prepare` wrote to `path`.

    Raises:
        InputError: it is of another format, broken, or not as it was sealed.
    """
    page = read_sealed(path / "set.json")
    check_format(path, page, FORMAT, UNSEALED)
    try:
        tree = open_tree(Path(page["source"])) if page["size"] is None else None
        sets = {
            check_name(name): _part(path / name, part, texts(page["classes"]), tree)
            for name, part in page["parts"].items()
        }
        return as_data(sets, page, path)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{path}: got a broken prepared set ({' '.join(str(error).split())[:200]}), expected "
            "what prepare wrote; prepare it again"
        ) from None


def check_format(path: Path, page: dict[str, Any], sealed: str, unsealed: str) -> None:
    """Refuse another format than these two, and one of a sealed format that has lost its seal."""
    if page.get("format") not in (sealed, unsealed) or (
        page["format"] == sealed and SEAL not in page
    ):
        raise InputError(
            f"{path}: got a set of format {page.get('format')!r}, expected {sealed!r} with its "
            "digest; prepare it again"
        )


def check_name(name: str) -> str:
    """`name`; raises `ValueError` if it is not that of a part, such as one that leads outside."""
    if not name or name.strip(".") == "" or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"a part named {name!r}")
    return name


def texts(values: Any) -> list[str]:
    """`values`; raises `TypeError` if it is not a list of texts."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("names that are no texts")
    return values


def as_data(
    sets: dict[str, ImageSet], page: dict[str, Any], path: Path
) -> Data | dict[str, ImageSet]:
    """The opened parts as train and test or as domains, as the set's page says."""
    if not sets:
        raise ValueError("no parts")
    if SEAL not in page:
        first = next(iter(sets.values()))
        first.notes = (*first.notes, UNVERIFIED.format(path))
    if page["kind"] == "domains":
        return sets
    names = tuple(tuple(texts(all_names)) for all_names in page["names"])
    train = sets["train"]
    if len(names) != len(train.classes) or not all(names):
        raise ValueError(f"{len(names)} classes with names of {len(train.classes)}")
    test = sets.get("test", train)
    if test.classes != train.classes:
        raise ValueError("train and test of other classes")
    return Data(train, test, names, tuple(texts(page["notes"])))


def _part(folder: Path, part: dict[str, Any], classes: list[str], tree: Tree | None) -> ImageSet:
    if tree is None:
        return MappedImages(folder, part, classes)
    content = read_regular(folder / "files.csv", LARGEST_LIST)
    if hashlib.sha256(content).hexdigest() != part["digest"]:
        raise ValueError(f"{folder / 'files.csv'} differs from its digest")
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8", "surrogateescape", newline="")
    rows = csv.reader(lines)
    if next(rows, None) != COLUMNS:
        raise ValueError(f"{folder / 'files.csv'} without its head {','.join(COLUMNS)}")
    return VerifiedFiles(part, tree, rows, classes)
