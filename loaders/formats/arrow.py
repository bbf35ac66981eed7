"""Datasets of the Hugging Face library: folders of `save_to_disk` (Arrow), and parquet shards.

The one file that imports pyarrow. A set has an image feature, a struct of `bytes` and `path`, and a
label: a ClassLabel, whose names the features hold, a number or a text. Arrow files are mapped into
memory; of parquet a group of rows is read at a time, so prepare such a set before training on it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.datasets.label_files import sort_classes
from letheon.loaders.datasets.layouts import SPLIT, canonical
from letheon.loaders.decode import jpeg
from letheon.loaders.decode.encoded_image import EncodedImage, from_file
from letheon.loaders.decode.pillow import unreadable
from letheon.loaders.formats.shards import NUMBER, pair_splits

LABELS = ("label", "labels", "fine_label", "class", "target", "category")
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

    @property
    def digest(self) -> str:
        """Over classes, labels and rows, and the sizes of the files, not their contents."""
        sizes = [f"{file.name} {file.stat().st_size}" for file in self.files]
        total = hashlib.sha256("\n".join((*self.classes, *sizes)).encode())
        for numbers in (self.labels, self.numbers):
            total.update(numbers.astype("<i8").tobytes())
        return total.hexdigest()

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
        if k not in self._held:
            self._held[k] = _read_group(groups[k], [self.image]).column(0)
            if len(self._held) > GROUPS and groups[k][0].suffix == ".parquet":
                self._held.popitem(last=False)
        value = self._held[k][row - int(first[k])].as_py() or {}
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise unreadable(self.path(i), "its bytes are not in the file")
        return bytes(data)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": None, "_held": OrderedDict()}


def open_arrow(path: Path) -> Data | dict[str, ImageSet] | None:
    """Read the sets of a `save_to_disk` folder or of parquet shards; None if it is neither.

    A column "domain" divides a single split into domains. Splits without labels are passed over.

    Raises:
        InputError: pyarrow is not installed, or there is no one column of images or of labels.
    """
    splits = _find_files(path)
    if not splits:
        return None
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            f"got {path}, a set of the Hugging Face datasets library, expected pyarrow to read it; "
            "pip install '.[hub]' in the checkout"
        )
    sets: dict[str, ImageSet] = {}
    unlabeled: list[str] = []
    for split, files in splits.items():
        table, features = _read_columns(files)
        image, label = _choose_columns(path, features)
        column = table[label].to_pylist()
        names = _names(features[label], column)
        ranks = {name: rank for rank, name in enumerate(names)}
        labels = np.array(
            [-1 if c is None else c if isinstance(c, int) else ranks[str(c)] for c in column],
            np.int64,
        )
        if len(labels) == 0 or labels.min() < 0:
            unlabeled.append(split)
            continue
        if labels.max() >= len(names):
            raise InputError(
                f"{path}: got the label {labels.max()} for {len(names)} classes, expected numbers "
                "below that; mend the set"
            )
        rows = np.arange(len(labels))
        if len(splits) == 1 and DOMAIN in features:
            places = table[DOMAIN].to_pylist()
            called = dict(enumerate(features[DOMAIN].get("names", ())))
            of_row = np.array([canonical(str(called.get(place, place))) for place in places])
            return {
                str(name): _part(str(name), files, image, rows[of_row == name], labels, names)
                for name in np.unique(of_row)
            }
        sets[split] = _part(f"{path.name}/{split}", files, image, rows, labels, names)
    if not sets:
        raise InputError(f"{path}: got {', '.join(unlabeled)} without labels, expected labels")
    first = next(iter(sets.values()))
    if any(images.classes != first.classes for images in sets.values()):
        raise InputError(f"{path}: got splits of other classes, expected the same; mend the set")
    found = pair_splits(sets)
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
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
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
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / part["filename"] for part in state["_data_files"]]


def _row_groups(file: Path) -> list[tuple[Path, int, int]]:
    """Each group of rows of a file: the file, the group's number, its rows."""
    import pyarrow.parquet as parquet

    if file.suffix == ".parquet":
        about = parquet.ParquetFile(file).metadata
        return [(file, k, about.row_group(k).num_rows) for k in range(about.num_row_groups)]
    return [(file, 0, _map_stream(file).num_rows)]


def _read_group(group: tuple[Path, int, int], columns: list[str]) -> Any:
    import pyarrow.parquet as parquet

    file, k, _ = group
    if file.suffix == ".parquet":
        return parquet.ParquetFile(file).read_row_group(k, columns=columns)
    return _map_stream(file).select(columns)


def _map_stream(file: Path) -> Any:
    """The table of an Arrow stream, mapped and not read."""
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: cannot be read ({reason}); copy the set again") from None


def _read_columns(files: Sequence[Path]) -> tuple[Any, Features]:
    """The columns beside the images, over all files, and the features as the library wrote them."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        schema = (
            parquet.read_schema(files[0])
            if files[0].suffix == ".parquet"
            else _map_stream(files[0]).schema
        )
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        kinds = written.get("info", {}).get("features", {})
        features: Features = {name: dict(kinds.get(name, {})) for name in schema.names}
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
    except (pyarrow.ArrowInvalid, OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{files[0]}: cannot be read ({reason}); copy the set again") from None


def _choose_columns(path: Path, features: Features) -> tuple[str, str]:
    """The columns of images and of labels, where there is one of each."""
    images = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    named = [name for name in LABELS if name in features and name not in images]
    classes = [n for n, kind in features.items() if kind.get("_type") == "ClassLabel"]
    labels = named[:1] or [name for name in classes if name != DOMAIN]
    if len(images) != 1 or len(labels) != 1:
        raise InputError(
            f"{path}: got the columns {', '.join(features)}, expected one of images and one of "
            f"labels, called {LABELS[0]}; rename or remove the others"
        )
    return images[0], labels[0]


def _names(feature: Any, column: Sequence[Any]) -> list[str]:
    """The classes in label order: the feature's names, numbers, or the texts sorted."""
    if feature.get("names"):
        return list(feature["names"])
    if all(isinstance(cell, int) for cell in column):
        return [str(number) for number in range(max(column, default=-1) + 1)]
    return sort_classes({str(cell) for cell in column if cell is not None})
