"""A checked set on disk: every image was opened once, the unreadable ones are listed and left out.

With a size, the images are decoded to one array that is mapped into memory; without, only the
list of good files is kept and the photographs are decoded when read.

    set.json               kind, classes, names, source, a digest for each part
    quarantine.csv         file, reason
    <part>/images.npy      (N, size, size, 3) uint8   } with a size
    <part>/labels.npy      (N,) int64                 }
    <part>/files.csv       path, label, bytes, SHA-256  without
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from letheon.errors import InputError
from letheon.loaders.datasets.archives import open_tree
from letheon.loaders.datasets.files import CheckedImages
from letheon.loaders.datasets.image_set import ArrayImages, Data, ImageSet
from letheon.loaders.datasets.tree import Tree

FORMAT = "letheon-set-1"


class MappedImages(ArrayImages):
    """A prepared part; pickled by its place, so workers map the file instead of copying it."""

    def __init__(self, name: str, folder: Path, classes: Sequence[str], digest: str) -> None:
        pixels = np.load(folder / "images.npy", mmap_mode="r")
        super().__init__(name, pixels, np.load(folder / "labels.npy"), classes, digest)
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedImages, (self.name, self._folder, self.classes, self.digest)


def is_prepared(path: Path) -> bool:
    """Whether `prepare` wrote this folder."""
    return (path / "set.json").is_file()


def open_arrays(path: Path) -> Data | dict[str, ImageSet]:
    """The set that `prepare` wrote to `path`; raises `InputError` if it is of another format."""
    try:
        page = json.loads((path / "set.json").read_text(encoding="utf-8"))
        if page["format"] != FORMAT:
            raise InputError(
                f"{path}: got a set of format {page['format']!r}, expected {FORMAT!r}; "
                "prepare it again"
            )
        tree = open_tree(Path(page["source"])) if page["size"] is None else None
        sets = {
            name: _part(path / name, about, page, tree) for name, about in page["parts"].items()
        }
        if page["kind"] == "domains":
            return sets
        names = tuple(tuple(all_names) for all_names in page["names"])
        return Data(sets["train"], sets.get("test", sets["train"]), names, tuple(page["notes"]))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: got a broken prepared set ({' '.join(str(error).split())}), expected what "
            "prepare wrote; prepare it again"
        ) from None


def _part(folder: Path, part: dict[str, Any], page: dict[str, Any], tree: Tree | None) -> ImageSet:
    if tree is None:
        return MappedImages(part["name"], folder, page["classes"], part["digest"])
    with open(folder / "files.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    paths, labels = [row["path"] for row in rows], [int(row["label"]) for row in rows]
    sums = [row["sha256"] for row in rows]
    return CheckedImages(part["name"], tree, paths, labels, page["classes"], sums=sums)
