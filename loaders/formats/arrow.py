"""Datasets of the Hugging Face library: folders of `save_to_disk` (Arrow), and parquet shards.

The one file that imports pyarrow. A set has an image feature, a struct of `bytes` and `path`, and a
label: a ClassLabel, whose names the features hold, a number or a text. Arrow files are mapped into
memory; of parquet a group of rows is read at a time, so prepare such a set before training on it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError, UnreadableImage, install_extra
from letheon.loaders.datasets.files import sample_numbers
from letheon.loaders.datasets.image_set import Data, ImageSet, number_classes
from letheon.loaders.datasets.label_files import COLUMNS, sort_classes
from letheon.loaders.datasets.layouts import SPLIT, canonical
from letheon.loaders.decode import jpeg
from letheon.loaders.decode.encoded_image import EncodedImage, from_file
from letheon.loaders.decode.pillow import unreadable
from letheon.loaders.formats.arrays import check_name, texts
from letheon.loaders.formats.shards import NUMBER, pair_splits
from letheon.sealed import expect_shape, parse_json, read_sealed

DOMAIN = "domain"
GROUPS = 8  # groups of rows of parquet files held in memory
Features = dict[str, Any]


class ArrowImages(ImageSet):
    """Rows of Arrow or parquet files; pickled by the files' paths."""

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        image: str,
        numbers: NDArray[np.int64],
        labels: NDArray[np.int64],
        classes: Sequence[str],
    ) -> None:
        """`image` is the column of the images; `numbers` (N,) are the rows, over all files."""
        self.name, self.files, self.image = name, list(files), image
        self.numbers, self.labels, self.classes = numbers, labels, tuple(classes)
        self._open: tuple[list[Any], NDArray[np.int64]] | None = None  # groups, first rows
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._digest = ""

    @property
    def digest(self) -> str:
        """Over classes, labels, rows, sizes of files, and the bytes of a keyed sample of images."""
        if not self._digest:
            sizes = [f"{file.name} {file.stat().st_size}" for file in self.files]
            total = hashlib.sha256("\n".join((*self.classes, *sizes)).encode())
            for numbers in (self.labels, self.numbers):
                total.update(numbers.astype("<i8").tobytes())
            for i in sample_numbers(len(self)):
                try:
                    total.update(hashlib.sha256(self._bytes(i)).digest())
                except UnreadableImage:  # whether that is an error is for its reader to say
                    total.update(b"unreadable")
            self._digest = total.hexdigest()
        return self._digest

    def encoded_image(self, i: int) -> EncodedImage:
        """The JPEG of image i, or its pixels; raises `UnreadableImage`."""
        return from_file(self._bytes(i), self.path(i))

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i, (H, W, 3); raises `UnreadableImage` naming it."""
        return jpeg.pixels(np.frombuffer(self._bytes(i), np.uint8), self.path(i))

    def _bytes(self, i: int) -> bytes:
        if self._open is None:
            groups = [group for file in self.files for group in _row_groups(file)]
            self._open = groups, np.cumsum([0, *(group[2] for group in groups)])
        groups, first = self._open
        row = int(self.numbers[i])
        k = int(np.searchsorted(first, row, side="right")) - 1
        group = self._held.get(k)  # held by this thread while others change the groups
        if group is None:
            group = self._held[k] = _read_group(groups[k], self.image)
            if len(self._held) > GROUPS and groups[k][0].suffix == ".parquet":
                self._held.popitem(last=False)
        try:
            value = group[row - int(first[k])].as_py()
        except (LookupError, ValueError) as error:
            raise unreadable(self.path(i), " ".join(str(error).split())) from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data or not isinstance(data, bytes):
            raise unreadable(self.path(i), "its bytes are not in the file")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": None, "_held": OrderedDict()}


def open_arrow(path: Path) -> Data | dict[str, ImageSet] | None:
    """Read the sets of a `save_to_disk` folder or of parquet shards; None if it is neither.

    A column "domain" divides a single split into domains. Splits without labels are passed over.

    Raises:
        InputError: pyarrow is not installed, there is no one column of images or of labels, a file
            is missing or broken, or as `pair_splits`.
    """
    splits = _find_files(path)
    if not splits:
        return None
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            f"got {path}, a set of Hugging Face datasets; expected pyarrow, which reads it; "
            f"{install_extra('hub')}"
        )
    sets: dict[str, ImageSet] = {}
    unlabeled: list[str] = []
    for split, files in splits.items():
        table, features = _read_columns(files)
        image, label = _choose_columns(path, features)
        with _expect_whole(files[0]):
            column = table[label].to_pylist()
        names = _names(path, features[label], column)
        ranks = {name: rank for rank, name in enumerate(names)}
        labels = np.array([_rank(cell, ranks) for cell in column], np.int64)
        if len(labels) == 0 or labels.min() < 0:
            unlabeled.append(split)
            continue
        if labels.max() >= len(names):
            raise InputError(
                f"{path}: got the label {column[int(labels.argmax())]!r} for {len(names)} classes, "
                "expected one of these; mend the set"
            )
        rows = np.arange(len(labels))
        if len(splits) == 1 and DOMAIN in features:
            places = table[DOMAIN].to_pylist()
            called = dict(enumerate(features[DOMAIN].get("names") or ()))
            of_row = np.array([canonical(str(called.get(place, place))) for place in places])
            return {
                str(name): _part(str(name), files, image, rows[of_row == name], labels, names)
                for name in np.unique(of_row)
            }
        sets[split] = _part(f"{path.name}/{split}", files, image, rows, labels, names)
    if not sets:
        raise InputError(f"{path}: got {', '.join(unlabeled)} without labels, expected labels")
    found = pair_splits(sets)
    first = found.train if isinstance(found, Data) else next(iter(found.values()))
    first.notes = tuple(f"{split} has no labels and is not read" for split in unlabeled)
    return found


def _part(
    name: str, files: Sequence[Path], image: str, rows: NDArray[np.int64],
    labels: NDArray[np.int64], names: Sequence[str],
) -> ArrowImages:  # fmt: skip
    return ArrowImages(name, files, image, rows, labels[rows], names)


def _find_files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, in order; nothing where the folder is of another kind."""
    if path.is_file() and path.suffix == ".parquet":
        return {"train": [path]}
    if not path.is_dir():
        return {}
    if (page := path / "dataset_dict.json").is_file():
        with expect_shape(page):
            names = [check_name(name) for name in texts(read_sealed(page)["splits"])]
        return {name: _arrow_files(path / name) for name in names}
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return {"train": _arrow_files(path)}
    splits: dict[str, list[Path]] = {}
    for file in sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")]):
        words = (file.stem.partition("-")[0], NUMBER.sub("", file.stem), file.parent.name)
        match = next((m for word in words if (m := SPLIT.fullmatch(word.lower()))), None)
        splits.setdefault(match[1] if match is not None else "train", []).append(file)
    return splits


def _arrow_files(folder: Path) -> list[Path]:
    page = folder / "state.json"
    with expect_shape(page):
        files = [folder / check_name(part["filename"]) for part in read_sealed(page)["_data_files"]]
    if not files:
        raise InputError(f"{page}: got no files, expected some; copy the set again")
    return files


def _row_groups(file: Path) -> list[tuple[Path, int, int]]:
    """Each group of rows of a file: the file, the group's number, its rows."""
    import pyarrow.parquet as parquet

    if file.suffix != ".parquet":
        return [(file, 0, _map_stream(file).num_rows)]
    with _expect_whole(file):
        about = parquet.ParquetFile(file).metadata
        return [(file, k, about.row_group(k).num_rows) for k in range(about.num_row_groups)]


def _read_group(group: tuple[Path, int, int], column: str) -> Any:
    """One column of a group of rows."""
    import pyarrow.parquet as parquet

    file, k, _ = group
    with _expect_whole(file):
        if file.suffix == ".parquet":
            return parquet.ParquetFile(file).read_row_group(k, columns=[column]).column(0)
        return _map_stream(file).column(column)


def _map_stream(file: Path) -> Any:
    """The table of an Arrow stream, mapped; of the images only their extents are read."""
    import pyarrow

    with _expect_whole(file):
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
        table.validate(full=True)  # else a damaged extent leads outside the file
        return table


@contextmanager
def _expect_whole(file: Path) -> Iterator[None]:
    """Read a file by pyarrow: what it raises on a broken one becomes an `InputError`."""
    import pyarrow

    try:
        yield
    except (
        pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError, AttributeError,
        RecursionError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: cannot be read ({reason}); copy the set again") from None


def _read_columns(files: Sequence[Path]) -> tuple[Any, Features]:
    """The columns beside the images, over all files, and the features as the library wrote them."""
    import pyarrow
    import pyarrow.parquet as parquet

    with _expect_whole(files[0]):
        schema = (
            parquet.read_schema(files[0])
            if files[0].suffix == ".parquet"
            else _map_stream(files[0]).schema
        )
        written = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        kinds = written.get("info", {}).get("features", {})
        features: Features = {name: dict(kinds.get(name, {})) for name in schema.names}
        for kind in features.values():
            texts(kind.get("names") or [])
        plain = [f.name for f in schema if not pyarrow.types.is_nested(f.type)]
        plain = [n for n in plain if not pyarrow.types.is_binary(schema.field(n).type)]
        for name in set(schema.names) - set(plain):
            kind = schema.field(name).type
            if pyarrow.types.is_binary(kind) or (
                pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            ):
                features[name] = {"_type": "Image", **features[name]}
        parts = [
            parquet.read_table(file, columns=plain)
            if file.suffix == ".parquet"
            else _map_stream(file).select(plain)
            for file in files
        ]
        return pyarrow.concat_tables(parts), features


def _choose_columns(path: Path, features: Features) -> tuple[str, str]:
    """The columns of images and of labels, where there is one of each."""
    images = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    named = [name for name in COLUMNS if name in features and name not in images]
    classes = [n for n, kind in features.items() if kind.get("_type") == "ClassLabel"]
    labels = named[:1] or [name for name in classes if name != DOMAIN]
    if len(images) != 1 or len(labels) != 1:
        raise InputError(
            f"{path}: got the columns {', '.join(features)}, expected one of images and one of "
            f"labels, called {COLUMNS[0]}; rename or remove the others"
        )
    return images[0], labels[0]


def _rank(cell: Any, ranks: Mapping[str, int]) -> int:
    """The number of a label; -1 where there is none, and the count of the classes if not one."""
    if isinstance(cell, int):
        return max(-1, min(cell, len(ranks)))
    return -1 if cell is None else ranks.get(str(cell), len(ranks))


def _names(path: Path, feature: Any, column: Sequence[Any]) -> list[str]:
    """The classes in label order: the feature's names, numbers, or the texts sorted."""
    if feature.get("names"):
        return list(feature["names"])
    if all(isinstance(cell, int) for cell in column):
        return list(number_classes(max(column, default=-1), path))
    return sort_classes({str(cell) for cell in column if cell is not None})
