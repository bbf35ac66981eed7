"""Labels that stand in a text file and not in the folders: of flat folders, and of splits.

A table is recognized by its content: any ``.txt``, ``.csv`` or ``.tsv`` with a line for every image
that names its file and, in a column of its own, its class. Tiny-ImageNet's
``val_annotations.txt``, Kaggle's ``LOC_val_solution.csv`` and Caffe's ``val.txt`` are of this kind.
So are lists of classes alone, in the order of the images' names, and ImageNet's development kit.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from letheon.errors import InputError
from letheon.loaders.datasets import imagenet
from letheon.loaders.datasets.tree import SUFFIXES, Tree, bytewise

TABLES = (".txt", ".csv", ".tsv")
MAX_TABLE = 2**26  # bytes
TITLES = ("label", "labels", "class", "class_name", "category", "wnid", "synset", "target")
COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
"""Columns of a Hugging Face dataset that hold labels: the first that there is."""
WNID = re.compile(r"(?:^|_)(n\d{8})(?=[_.])")


class Labels(NamedTuple):
    """The class of each image, where it was read, and the classes in order."""

    of: list[str]  # for each image, in the order asked
    classes: list[str]
    words: dict[str, str]  # class -> what else it is called


def labels_in_names(names: Sequence[str]) -> Labels | None:
    """WordNet ids in file names: ``n01440764_tench.JPEG``, ``..._val_00000001_n01440764.JPEG``."""
    found = [WNID.search(name) for name in names]
    ids = [match[1] for match in found if match is not None]
    if len(ids) != len(names) or not names:
        return None
    words: dict[str, str] = {}
    for name, wnid in zip(names, ids, strict=True):
        rest = name.rpartition(".")[0].removeprefix(wnid).strip("_")
        if name.startswith(wnid) and rest and not rest[0].isdigit():
            words.setdefault(wnid, rest.replace("_", " "))
        elif wnid in imagenet.words():
            words.setdefault(wnid, imagenet.words()[wnid])
    return Labels(ids, bytewise(words.keys() | set(ids)), words)


def labels_in_file(
    tree: Tree, paths: Sequence[str], classes: Sequence[str] | None
) -> Labels | None:
    """Labels of the images at `paths`, which lie in one folder, from the first table that has all.

    `classes` are those of the training set, None where these images are it. Numbers count its
    sorted classes from 0, or from 1 where the greatest is their count.
    """
    folder = paths[0].rpartition("/")[0]
    texts = {text: tree.read(text).decode("utf-8-sig", "replace") for text in _near(tree, folder)}
    columns = [c for text in texts.values() if (c := _column(text, paths)) is not None]
    for column in columns:
        if classes is None:
            return Labels(column, sort_classes(column), {})
        if (named := _match_names(column, set(classes))) is not None:
            return Labels(named, list(classes), {})
    if classes is None:
        return None
    for name, text in texts.items():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        # A class a line, in the order of the names; a list of all classes, each once, is not it.
        if len(lines) == len(paths) > len(set(lines)) and not any(" " in line for line in lines):
            column = _development_kit(tree, name, lines) or lines
            if (named := _match_names(column, set(classes))) is not None:
                return Labels(named, list(classes), {})
    for column in columns:
        if (numbered := _match_numbers(column, classes)) is not None:
            return Labels(numbered, list(classes), {})
    return None


def sort_classes(names: Collection[str]) -> list[str]:
    """Unique class names in order: by number where all are numbers, else by their bytes."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return bytewise(unique)


def listed_splits(tree: Tree, paths: Sequence[str]) -> dict[str, list[str]] | None:
    """Image paths of train and test, where lists beside class folders divide them.

    CUB-200-2011's (``images.txt`` and ``train_test_split.txt``; Wah et al. 2011), or ``train.txt``
    with ``test.txt`` or ``val.txt`` that name every image in them, as Food-101's do.

    Raises:
        InputError: CUB's lists name an image that is not there.
    """
    at = {path.rpartition("/")[2]: path for path in tree.files if path.endswith(".txt")}
    known = set(paths)
    if {"images.txt", "train_test_split.txt"} <= set(at):
        folder = at["images.txt"].rpartition("/")[0]
        prefix = f"{folder}/images/".lstrip("/")
        files = _read_pairs(tree, at["images.txt"])
        marks = _read_pairs(tree, at["train_test_split.txt"])
        missing = [name for name in files.values() if prefix + name not in known]
        if missing or set(marks) != set(files):
            raise InputError(
                f"{tree.where(at['images.txt'])}: got {missing[0] if missing else 'a list'} that "
                "is not as train_test_split.txt or the images, expected CUB's own files; fetch "
                "them again"
            )
        return {
            split: bytewise(
                prefix + name for number, name in files.items() if marks[number] == mark
            )
            for split, mark in (("train", "1"), ("test", "0"))
        }
    for held_out in ("test.txt", "val.txt"):
        if "train.txt" in at and held_out in at:
            found = {
                split: _find_listed(tree.read(at[name]).decode("utf-8-sig", "replace"), paths)
                for split, name in (("train", "train.txt"), ("test", held_out))
            }
            if all(found.values()):
                return {split: bytewise(files) for split, files in found.items() if files}
    return None


def _find_listed(text: str, paths: Sequence[str]) -> list[str] | None:
    """The images that the lines name by class and file, with or without suffix; None if not."""
    by_tail = {}
    for path in paths:
        tail = "/".join(path.split("/")[-2:])
        by_tail[tail] = by_tail[_stem(tail)] = path
    out = []
    for line in text.splitlines():
        if line.strip():
            tail = "/".join(line.strip().rsplit(maxsplit=1)[0].split("/")[-2:])
            image = by_tail.get(tail) or by_tail.get("/".join(line.strip().split("/")[-2:]))
            if image is None:
                return None
            out.append(image)
    return out


def _near(tree: Tree, folder: str) -> list[str]:
    """Tables in the images' folder or above it, then those in folders without images."""
    texts = [p for p in tree.files if p.lower().endswith(TABLES) and tree.size(p) <= MAX_TABLE]
    around = [text for text in texts if f"{folder}/".startswith(_folder(text))]
    pictured = {_folder(path) for path in tree.files if path.lower().endswith(SUFFIXES)}
    above = {p[:end] for p in pictured for end in range(len(p)) if p[end - 1 : end] == "/"}
    others = [t for t in texts if t not in around and _folder(t) not in pictured | above]
    return sorted(around, key=lambda text: -text.count("/")) + others


def _folder(path: str) -> str:
    """The folder with its slash; "" at the root."""
    return path[: path.rfind("/") + 1]


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name


def _column(text: str, paths: Sequence[str]) -> list[str] | None:
    """The label of each image in a table; None where not every image has a line."""
    number: dict[str, int] = {}
    for i, path in enumerate(paths):
        name = path.rpartition("/")[2]
        number[name] = number[_stem(name)] = i
    out: list[str | None] = [None] * len(paths)
    titled: int | None = None
    for row, cells in enumerate(_cells(text)):
        place = next((k for k, c in enumerate(cells) if c.rpartition("/")[2] in number), None)
        if place is None:
            if row == 0:
                titles = [cell.lower() for cell in cells]
                titled = next((titles.index(t) for t in TITLES if t in titles), None)
            continue
        at = place + 1 if place + 1 < len(cells) else place - 1
        at = titled if titled is not None and titled < len(cells) else at
        if 0 <= at != place:
            out[number[cells[place].rpartition("/")[2]]] = cells[at]
    labels = [label for label in out if label]
    return labels if len(labels) == len(paths) else None


def _cells(text: str) -> list[list[str]]:
    """The columns of each line that is not empty: by tabs, by commas, or by white space."""
    start = text[:4096]
    if "\t" in start or "," in start:
        lines = io.StringIO(text, newline=None)
        rows = csv.reader(lines, delimiter="\t" if "\t" in start else ",")
        try:
            return [[cell.strip() for cell in row] for row in rows if any(row)]
        except csv.Error:  # such as a cell without an end: no table of labels
            return []
    return [line.split() for line in text.splitlines() if line.strip()]


def _read_pairs(tree: Tree, path: str) -> dict[str, str]:
    """The first word of each line and what follows it."""
    try:
        lines = tree.read(path).decode("utf-8-sig").splitlines()
        return {key: rest for key, rest in (s.split(maxsplit=1) for s in lines if s.strip())}
    except ValueError as error:
        raise InputError(
            f"{tree.where(path)}: got lines that are not text in two columns "
            f"({' '.join(str(error).split())[:200]}), expected CUB's own file; fetch it again"
        ) from None


def _match_names(column: Sequence[str], classes: Collection[str]) -> list[str] | None:
    """The labels as names of `classes`, by the whole cell or its first word; None if not all."""
    out = [cell if cell in classes else cell.split()[0] for cell in column]
    return out if set(out) <= set(classes) else None


def _match_numbers(column: Sequence[str], classes: Sequence[str]) -> list[str] | None:
    if not all(cell.isascii() and cell.isdigit() for cell in column):
        return None
    numbers = [int(cell) for cell in column]
    first = 1 if min(numbers) >= 1 and max(numbers) == len(classes) else 0
    if max(numbers) - first >= len(classes):
        return None
    ordered = sort_classes(classes)
    return [ordered[number - first] for number in numbers]


def _development_kit(tree: Tree, name: str, lines: Sequence[str]) -> list[str] | None:
    """WordNet ids for the numbers of ImageNet's ground truth, by the ``meta.mat`` beside it."""
    meta = f"{_folder(name)}meta.mat"
    if not name.endswith("ground_truth.txt") or meta not in set(tree.files):
        return None
    from scipy.io import loadmat  # here: other sets need not wait for it

    try:
        synsets: Any = loadmat(io.BytesIO(tree.read(meta)), squeeze_me=True)["synsets"]
        ids = {str(int(s["ILSVRC2012_ID"])): str(s["WNID"]) for s in synsets}
        return [ids[line] for line in lines]
    except Exception as error:  # scipy raises many kinds on broken files
        reason = " ".join(str(error).split())
        raise InputError(
            f"{tree.where(meta)}: got a file that is not read ({reason}), expected the one of "
            "ImageNet's development kit; fetch it again"
        ) from None
