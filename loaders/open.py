"""Opening data by path: "digits", a folder, an archive, a list file or a prepared set."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from letheon.errors import InputError, suggest
from letheon.loaders.datasets import digits, layouts, list_files
from letheon.loaders.datasets.archives import open_tree
from letheon.loaders.datasets.cifar import read_cifar
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.datasets.label_files import listed_splits
from letheon.loaders.datasets.tree import Tree
from letheon.loaders.formats import arrays
from letheon.loaders.formats.arrow import open_arrow
from letheon.loaders.formats.beton_set import is_betons, open_betons, open_ffcv
from letheon.loaders.formats.shards import read_shards
from letheon.loaders.views import divide_data

DOMAINS_OF_DIGITS = {"digits": digits.downstream, "digits-varied": digits.vary}


def open_source(path: str) -> Data | dict[str, ImageSet]:
    """Whatever is at `path`: train and test, or domains by name.

    Raises:
        InputError: Nothing is there, or it has no layout that `layouts` or `list_files` know.
    """
    return _open(path, divide=False)


def _open(path: str, divide: bool, alone: bool = False) -> Data | dict[str, ImageSet]:
    """As `open_source`; with `divide`, class folders with lists of splits are train and test.

    With `alone`, training images without others beside them are taken for both. Notes on the whole
    become the training images' too, which are those that a run prints.
    """
    found = _recognize(path, divide, alone)
    if isinstance(found, Data):
        notes = tuple(dict.fromkeys((*found.notes, *found.train.notes)))
        found = replace(found, notes=notes)
        found.train.notes = notes
    return found


def _recognize(path: str, divide: bool, alone: bool) -> Data | dict[str, ImageSet]:
    if path == "digits":
        train, test = digits.upstream()
        return Data(train, test, tuple((name,) for name in train.classes))
    if arrays.is_prepared(Path(path)):
        return arrays.open_arrays(Path(path))
    if is_betons(Path(path)):
        return open_betons(Path(path))
    if (files := open_ffcv(Path(path))) is not None:
        return files
    if (listed := list_files.open_lists(Path(path))) is not None:
        return listed
    if (table := open_arrow(Path(path))) is not None:
        return table
    if not Path(path).exists():
        raise InputError(
            f"got {path}, which does not exist, expected digits, or a folder or an archive of "
            f"images; check the path{suggest_path(path)}"
        )
    tree = open_tree(Path(path))
    cifar = read_cifar(tree)
    if cifar is not None:
        return cifar
    if (samples := read_shards(tree)) is not None:
        return samples
    layout = layouts.recognize_layout(tree)
    found = _read(tree, layout, divide, alone)
    if isinstance(found, Data):
        notes = layouts.note_unread(tree, layout, [found.train, found.test])
        found.train.notes = (*found.train.notes, *notes)
    else:
        first = next(iter(found.values()))
        first.notes = (*first.notes, *layouts.note_unread(tree, layout, found.values()))
    return found


def suggest_path(path: str) -> str:
    """Say which set, or which entry of the nearest folder there is, a mistyped path may mean."""
    place = Path(path)
    while not place.parent.is_dir():
        place = place.parent
    names = [name for name in os.listdir(place.parent) if not name.startswith(".")]
    beside = [*names, *({*DOMAINS_OF_DIGITS} - {path})] if len(Path(path).parts) == 1 else names
    hint = suggest(place.name, beside)
    return f"; {place.parent} is there{hint}" if hint and place != Path(path) else hint


def _read(
    tree: Tree, layout: layouts.Layout, divide: bool, alone: bool
) -> Data | dict[str, ImageSet]:
    if divide and layout.kind in ("classes", "domains"):
        lists = listed_splits(tree, layout.paths)
        if lists is not None:
            return layouts.split_by_lists(tree, layout, lists)
    if (listed := list_files.lists_beside(tree, layout)) is not None:
        return listed
    if layout.kind == "splits":
        return layouts.splits(tree, layout, alone)
    if layout.kind == "flat":
        return layouts.flat(tree, layout)
    return layouts.domains(tree, layout)


def open_data(path: str, holdout: float = 0, seed: int = 0) -> Data:
    """Train and test images at `path`: "digits", a folder, an archive or a prepared set.

    With `holdout`, images without a test split are divided, see `hold_out`.

    Raises:
        InputError: As `open_source`, the set has domains instead, or it has a test split and is to
            be divided all the same.
    """
    data = _open(path, divide=True, alone=bool(holdout))
    if isinstance(data, Data):
        return divide_data(data, holdout, seed) if holdout else data
    if not holdout or len(data) > 1:
        raise InputError(
            f"{path}: got {len(data)} domain(s) ({', '.join(list(data)[:4])}), expected train/ and "
            "test/ or val/ with class folders; a downstream set cannot be trained on"
            + ("; of one folder of classes a share can be held out" if len(data) == 1 else ""),
            option="holdout" if len(data) == 1 else "data",
        )
    (images,) = data.values()
    if isinstance(images, FileImages):
        names = layouts.class_names(images.tree, images.root, images.classes)
    else:
        names = tuple((name,) for name in images.classes)
    return divide_data(Data(images, images, names, images.notes), holdout, seed)


def open_domains(path: str) -> dict[str, ImageSet]:
    """Domains by name: a layout of domains, lists, or class folders, or embedded ones.

    These are "digits" (four redrawings) and "digits-varied" (four ways to disturb each image).

    Raises:
        InputError: As `open_source`, or the set has train and test instead.
    """
    if path in DOMAINS_OF_DIGITS:
        return dict(DOMAINS_OF_DIGITS[path]())
    found = open_source(path)
    if isinstance(found, Data):
        raise InputError(
            f"{path}: got train and test images, expected <domain>/<class>/ or <class>/ folders; "
            "name one of its splits to read that as a domain"
        )
    return found
