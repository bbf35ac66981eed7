"""WebDataset shards: tars whose files of one name, up to the first dot, are one sample.

``<key>.jpg`` with ``<key>.cls`` (a number or a name) or ``<key>.json`` (a field "label", "cls",
"class" or "target"). Splits by the names of the shards or their folders: ``train-000012.tar``,
``test/0.tar``. They are read in place, by index, as any tar; nothing but the labels is read first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from letheon.errors import InputError, UnreadableImage
from letheon.loaders.datasets.archives import Tar
from letheon.loaders.datasets.files import ListedImages
from letheon.loaders.datasets.image_set import MAX_CLASSES, Data, ImageSet, number_classes
from letheon.loaders.datasets.label_files import sort_classes
from letheon.loaders.datasets.layouts import SPLIT, find_splits
from letheon.loaders.datasets.tree import SUFFIXES, Bundle, Tree
from letheon.sealed import parse_json

LABELS = ("cls", "cls.txt", "json")
FIELDS = ("label", "cls", "class", "target")  # of a .json
NAMES = ("classnames.txt", "classes.txt")
NUMBER = re.compile(r"(?:[-_.]?\d+(?:[-_]of[-_]\d+)?)?$")  # of a shard, at the end of its name


def read_shards(tree: Tree) -> Data | dict[str, ImageSet] | None:
    """Read the samples if `tree` holds WebDataset shards, else None; one set where no split is.

    Raises:
        InputError: A sample without its label or with several images, or a label that is none.
    """
    if not isinstance(tree, Tar | Bundle):
        return None
    samples: dict[str, dict[str, str]] = {}
    for path in tree.files:
        folder, slash, file = path.rpartition("/")
        key, _, extension = file.partition(".")
        samples.setdefault(folder + slash + key, {})[extension.lower()] = path
    images: dict[str, str] = {}
    for key, parts in samples.items():
        pictures = [ext for ext in parts if f".{ext}" in SUFFIXES]
        if len(pictures) > 1:
            return None
        if pictures:
            images[key] = parts[pictures[0]]
    kind = next((k for k in LABELS if any(k in samples[key] for key in images)), None)
    first = next((samples[key][kind] for key in images if kind in samples[key]), "") if kind else ""
    if kind is None or not _read_label(tree, first):
        return None
    lost = next((key for key in images if kind not in samples[key]), None)
    if lost is not None:
        raise InputError(
            f"{tree.where(images[lost])}: got a sample without its .{kind}, expected one for every "
            "image; add it or remove the image"
        )
    labels = {key: _read_label(tree, samples[key][kind]) for key in images}
    empty = next((key for key in images if not labels[key]), None)
    if empty is not None:
        raise InputError(
            f"{tree.where(samples[empty][kind])}: got no label, expected a class, or a field "
            f"{' or '.join(FIELDS)}; add it"
        )
    by_split: dict[str, list[str]] = {}
    for key in images:
        by_split.setdefault(_split_of(key), []).append(key)
    classes, ranks = _class_names(tree, list(labels.values()))
    sets: dict[str, ImageSet] = {
        split: ListedImages(
            f"{tree.root.name}/{split}" if split else tree.root.name.partition(".")[0],
            tree, [images[key] for key in keys], [ranks[labels[key]] for key in keys], classes,
        )
        for split, keys in by_split.items()
    }  # fmt: skip
    return pair_splits(sets)


def pair_splits(sets: Mapping[str, ImageSet]) -> Data | dict[str, ImageSet]:
    """Train with the held-out split that is preferred; all as domains where none is to be had.

    Classes that are numbers alone are those of the set that has most: a split may lack the last.

    Raises:
        InputError: The two splits have other classes.
    """
    classes = max((images.classes for images in sets.values()), key=len)
    for images in sets.values():
        if images.classes == tuple(map(str, range(len(images.classes)))):  # numbers
            images.classes = classes
    train, held_out = find_splits(list(sets))
    if train is None or not held_out:
        return {images.name: images for images in sets.values()}
    first, second = sets[train], sets[held_out[0]]
    if first.classes != second.classes:
        odd = sorted(set(first.classes) ^ set(second.classes))
        raise InputError(
            f"got {first.name} of {len(first.classes)} classes and {second.name} of "
            f"{len(second.classes)}, {f'{odd[0]!r} in one alone' if odd else 'in another order'}; "
            "expected the same in both; mend the set"
        )
    others = [split for split in sets if split not in (train, held_out[0])]
    notes = tuple(f"{split} is there too and is not read" for split in others)
    return Data(first, second, tuple((name,) for name in first.classes), notes)


def _split_of(key: str) -> str:
    """Name the split that a sample's shard or its folder is named after; "" where neither is."""
    for part in reversed(key.split("/")[:-1]):
        match = SPLIT.fullmatch(NUMBER.sub("", part).lower())
        if match is not None:
            return match[1]
    return ""


def _read_label(tree: Tree, path: str) -> str:
    """The label in a sample's file; "" where there is none."""
    try:
        text = tree.read(path).decode("utf-8").strip()
        if not path.lower().endswith(".json"):
            label = text
        else:
            fields = parse_json(text)
            label = next((str(fields[name]) for name in FIELDS if name in fields), "")
    except (UnreadableImage, ValueError, TypeError) as error:
        raise InputError(
            f"{tree.where(path)}: got a label that cannot be read ({error}), expected text; mend it"
        ) from None
    return label


def _class_names(tree: Tree, labels: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """The classes, named by a list in the shards' folder where it has one, and each label's."""
    if not all(label.isdecimal() for label in labels):
        classes = sort_classes(labels)
        return classes, {name: rank for rank, name in enumerate(classes)}
    largest = max(int(label) if len(label) < 19 else MAX_CLASSES for label in labels)
    classes = list(number_classes(largest, tree.root))
    for path in tree.files:
        if path.rpartition("/")[2] in NAMES:
            text = tree.read(path).decode("utf-8-sig", "replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if largest < len(lines) == len(set(lines)):
                classes = lines
                break
    return classes, {label: int(label) for label in labels}
