"""Image folders and archives: which layout it is, and the image sets in it.

Layouts, found by their paths alone (one folder round everything is looked through):

- splits: ``train/<class>/`` with ``test/``, ``val/`` or another usual name (ImageNet's, CIFAR's as
  JPEGs); a split may be flat, its labels in its files' names or in a table (`label_files`)
- domains: ``<domain>/<class>/`` (Office-Home's)
- classes: ``<class>/``, one domain (CUB's)
- flat: ``<wnid>_<name>.JPEG``, no folders, or a table beside the images; classes are sorted
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np

from letheon.errors import InputError
from letheon.loaders.datasets import imagenet
from letheon.loaders.datasets.files import FileImages, ListedImages
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.datasets.label_files import (
    WNID,
    Labels,
    labels_in_file,
    labels_in_names,
    sort_classes,
)
from letheon.loaders.datasets.tree import SUFFIXES, Tree, bytewise, looks_like_image

HELD_OUT = ("test", "val", "valid", "validation")
NONE_HELD_OUT = "nothing is held out: test is the same as train"
# A folder's name as one of a split: "train", "testing", "seg_train", "val_images".
SPLIT = re.compile(
    r"(?:.*[^a-z])?(train(?:ing)?|test(?:ing)?|val(?:id|idation)?|eval(?:uation)?|dev)"
    r"[-_ ]?(?:set|data|images?|img|split|folder)?(?:[-_ ]?v?\d+)?"
)
NUMBERED = re.compile(r"\d{3}\.(.+)")
INNER = ("images", "image", "imgs", "img", "data", "jpegimages")  # folders that mean nothing


class Layout(NamedTuple):
    """What was found: the kind, the folder round everything, and the image paths below it."""

    kind: Literal["splits", "domains", "classes", "flat"]
    root: str  # "" or "folder/.../"
    paths: list[str]  # relative to the tree, sorted
    folders: list[str]  # the folders directly below the root, sorted


def recognize_layout(tree: Tree) -> Layout:
    """The layout of the images in `tree`; raises `InputError` when there are none."""
    paths = [p for p in tree.files if p.lower().endswith(SUFFIXES)]
    if not paths:
        raise InputError(
            f"{tree.root}: got no image, expected {', '.join(SUFFIXES)} files in class folders; "
            "check the path"
        )
    root = ""
    while len(tops := {path[len(root) :].partition("/")[0] for path in paths}) == 1:
        (top,) = tops
        if top.lower() == "train" or f"{root}{top}" == paths[0]:
            break
        root += f"{top}/"
    depths = {path.count("/", len(root)) for path in paths}
    folders = bytewise(children(tree, paths, root))
    train, held_out = find_splits(folders)
    if train and (held_out or any(p.count("/", len(f"{root}{train}/")) for p in paths)):
        return Layout("splits", root, paths, folders)
    if depths == {0}:
        return Layout("flat", root, paths, folders)
    return Layout("classes" if 1 in depths else "domains", root, paths, folders)


def children(tree: Tree, paths: Sequence[str], root: str) -> set[str]:
    """Names of the folders directly below `root`, empty ones too."""
    below = [p[len(root) :].partition("/") for p in paths if p.startswith(root)]
    empty = [p[len(root) :].partition("/")[0] for p in tree.folders if p.startswith(root)]
    return {top for top, slash, _ in below if slash} | {top for top in empty if top}


def find_splits(folders: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder of training images, and those held out, preferred ones first."""
    by_kind: dict[str, list[str]] = {}
    for folder in folders:
        match = SPLIT.fullmatch(folder.lower())
        if match is not None:
            by_kind.setdefault(match[1][:2], []).append(folder)  # tr, te, va, ev, de
    training = [folder for folder in by_kind.get("tr", []) if folder.lower() == "train"]
    training = training or by_kind.get("tr", [])
    held_out = [f for kind in ("te", "va", "ev", "de") for f in by_kind.get(kind, [])]
    held_out.sort(key=lambda f: HELD_OUT.index(f.lower()) if f.lower() in HELD_OUT else 9)
    plain = len(training) == 1 and (held_out or training[0].lower() == "train")
    return (training[0], held_out) if plain else (None, [])


def class_set(
    tree: Tree, layout: Layout, root: str, name: str, classes: Sequence[str] | None = None
) -> FileImages:
    """The images of the class folders in `root`; labels are ranks in `classes` or sorted names.

    Raises:
        InputError: No class folder, an empty one, or an image outside them.
    """
    paths = [path for path in layout.paths if path.startswith(root)]
    found = bytewise(children(tree, paths, root))
    names = [path[len(root) :].partition("/")[0] for path in paths]
    where = tree.where(root)
    loose = [path for path in paths if "/" not in path[len(root) :]]
    empty = bytewise(set(found) - set(names))
    if not found:
        raise InputError(f"{where}: got no class folder, expected <class>/ folders of images")
    if loose:
        raise InputError(
            f"{tree.where(loose[0])}: got an image outside the class folders "
            f"({len(loose)} such), expected <class>/<image>; move it into its class"
        )
    if empty:
        raise InputError(
            f"{where}{empty[0]}: got a class folder without images ({len(empty)} such), expected "
            "at least one; fill or remove it"
        )
    ordered = sort_classes(found) if classes is None else list(classes)
    ranks = {c: rank for rank, c in enumerate(ordered)}
    place = {c: at for at, c in enumerate(found)}  # images come in the order of their folders
    places = np.array([place[n] for n in names])
    if (places[1:] < places[:-1]).any():
        order = np.argsort(places, kind="stable").tolist()
        paths, names = [paths[i] for i in order], [names[i] for i in order]
    images = FileImages(name, tree, paths, [ranks[n] for n in names], ordered, layout.root)
    if classes is None and ordered != found:
        images.notes = (
            f"{where}: class folders are numbers and are taken in the order of the numbers, "
            f"{', '.join(ordered[:3])}, ..., not sorted as text; for another order name it with "
            "the setting classes",
        )
    return images


def splits(tree: Tree, layout: Layout, alone: bool = False) -> Data:
    """Train and held-out images; of several held-out splits, the first with train's classes.

    With `alone`, training images that have none beside them are the test images too.

    Raises:
        InputError: No held-out split has the classes of the training images, or labels.
    """
    name = tree.root.name
    folder, there = find_splits(layout.folders)
    assert folder is not None
    train = _split_set(tree, layout, folder, f"{name}/train", None)
    if train is None:
        raise _missing_labels(tree, layout, folder)
    if not there and alone:
        return Data(train, train, class_names(tree, layout.root, train.classes), (NONE_HELD_OUT,))
    if not there:
        raise InputError(
            f"{tree.root}: got {folder}/ alone, expected {', '.join(HELD_OUT[:-1])} beside it; "
            "add held-out images, or hold out a share of these",
            option="holdout",
        )
    for split in there:
        test = _split_set(tree, layout, split, f"{name}/{split}", train.classes)
        if test is not None:
            others = [other for other in there if other != split]
            notes = tuple(f"{other}/ is there too and is not read" for other in others)
            return Data(train, test, class_names(tree, layout.root, train.classes), notes)
    found = bytewise(children(tree, layout.paths, _inner(tree, layout, there[0], train.classes)))
    differ = bytewise(set(found) ^ set(train.classes))
    if not found or not differ:
        raise _missing_labels(tree, layout, there[0])
    raise InputError(
        f"{tree.root}: got {len(train.classes)} classes in {folder}/ and {len(found)} in "
        f"{there[0]}/ ({differ[0]!r} is in one alone), expected the same; add or remove class "
        "folders"
    )


def _split_set(
    tree: Tree, layout: Layout, folder: str, name: str, classes: Sequence[str] | None
) -> FileImages | None:
    """The images of one split; None where their labels are not known or are not of `classes`."""
    root = _inner(tree, layout, folder, classes)
    paths = [path for path in layout.paths if path.startswith(root)]
    if paths and all("/" not in path[len(root) :] for path in paths):
        labels = labels_in_names([path[len(root) :] for path in paths])
        if labels is None or (classes is not None and not set(labels.of) <= set(classes)):
            labels = labels_in_file(tree, paths, classes)
        return None if labels is None else _label_images(tree, layout, name, paths, labels, classes)
    if classes is not None and set(children(tree, layout.paths, root)) != set(classes):
        return None
    return class_set(tree, layout, root, name, classes)


def _inner(tree: Tree, layout: Layout, folder: str, classes: Sequence[str] | None) -> str:
    """The folder of a split, or one in it that holds everything and is no class."""
    root = f"{layout.root}{folder}/"
    while len(inner := children(tree, layout.paths, root)) == 1:
        (only,) = inner
        split = SPLIT.fullmatch(only.lower())
        if only.lower() not in INNER and split is None and classes is None:
            break
        if only in (classes or ()) or any(
            p[len(root) :].count("/") == 0 for p in layout.paths if p.startswith(root)
        ):
            break
        root += f"{only}/"
    return root


def _label_images(
    tree: Tree, layout: Layout, name: str, paths: Sequence[str], labels: Labels,
    classes: Sequence[str] | None = None,
) -> FileImages:  # fmt: skip
    ordered = labels.classes if classes is None else list(classes)
    ranks = {c: rank for rank, c in enumerate(ordered)}
    numbers = [ranks[label] for label in labels.of]
    return ListedImages(name, tree, paths, numbers, ordered, layout.root)


def _missing_labels(tree: Tree, layout: Layout, folder: str) -> InputError:
    return InputError(
        f"{tree.where(layout.root)}{folder}/: got images outside class folders and no table of "
        "their labels, expected <class>/<image>, or a text file with a line for every image: its "
        "name and its class; put ImageNet's LOC_val_solution.csv or its development kit, or such "
        "a table, beside it"
    )


def domains(tree: Tree, layout: Layout) -> dict[str, ImageSet]:
    """The domains by canonical name, sorted; their classes are the union over all domains.

    A folder beside them that holds only files of another kind is passed over.
    """
    if layout.kind == "classes":
        name = layout.root.rstrip("/").rpartition("/")[2] or tree.root.name.partition(".")[0]
        return {name: class_set(tree, layout, layout.root, name)}
    depth = len(layout.root)
    pictured = {path[depth:].partition("/")[0] for path in layout.paths}
    other = {path[depth:].partition("/")[0] for path in tree.files} - pictured
    tops = [top for top in layout.folders if top not in other]
    union: set[str] = set()
    for top in tops:
        union |= children(tree, layout.paths, f"{layout.root}{top}/")
    out: dict[str, ImageSet] = {}
    for top in tops:
        name = canonical(top)
        if name in out:
            raise InputError(
                f"{tree.root}: got the domain {name!r} in two folders, expected one; remove one"
            )
        out[name] = class_set(tree, layout, f"{layout.root}{top}/", name, bytewise(union))
    return dict(sorted(out.items()))


def canonical(domain: str) -> str:
    """One spelling of a domain: Office-Home's "Real World" is found with space, "_" or neither."""
    return "Real_World" if re.sub(r"[ _-]", "", domain).lower() == "realworld" else domain


def flat(tree: Tree, layout: Layout) -> Data:
    """One folder of images, labels in names or a table; nothing is held out, so test is train."""
    names = [path[len(layout.root) :] for path in layout.paths]
    in_names = labels_in_names(names)
    labels = in_names or labels_in_file(tree, layout.paths, None)
    if labels is None:
        outside = next(p for p, n in zip(layout.paths, names, strict=True) if not WNID.search(n))
        raise InputError(
            f"{tree.where(outside)}: got an image outside any folder, expected <split>/<class>/, "
            "<domain>/<class>/, <class>/, names like n01440764_tench.JPEG, or a text file beside "
            "the images with the name and class of each; sort it in"
        )
    if in_names is None:
        images = _label_images(tree, layout, tree.root.name, layout.paths, labels)
    else:
        ranks = {wnid: rank for rank, wnid in enumerate(labels.classes)}
        numbers = [ranks[wnid] for wnid in labels.of]
        images = FileImages(
            tree.root.name, tree, layout.paths, numbers, labels.classes, layout.root
        )
    called = tuple((c, labels.words[c]) if c in labels.words else (c,) for c in labels.classes)
    return Data(images, images, called, (NONE_HELD_OUT,))


def split_by_lists(tree: Tree, layout: Layout, lists: dict[str, list[str]]) -> Data:
    """Class folders divided into train and test by lists, see `listed_splits`.

    Raises:
        InputError: A list names no image, or the test images have a class of their own.
    """
    classes = sort_classes({path.split("/")[-2] for path in lists["train"]})
    ranks = {c: rank for rank, c in enumerate(classes)}
    sets = {}
    for split, paths in lists.items():
        labels = [ranks.get(path.split("/")[-2], -1) for path in paths]
        if not paths or min(labels) < 0:
            raise InputError(
                f"{tree.root}: got a list of {split} images that is empty or has a class of its "
                "own, expected the classes of the training images; mend the list"
            )
        name = f"{tree.root.name}/{split}"
        sets[split] = ListedImages(name, tree, paths, labels, classes, layout.root)
    return Data(sets["train"], sets["test"], class_names(tree, layout.root, classes))


def note_unread(tree: Tree, layout: Layout, sets: Collection[ImageSet]) -> tuple[str, ...]:
    """One line on the files that look like images and are in no set; nothing where all are."""
    unread = [path for path in tree.hidden if looks_like_image(path)]
    if len(tree.files) > len(layout.paths):
        unread += [
            path
            for path in tree.files
            if looks_like_image(path) and not path.lower().endswith(SUFFIXES)
        ]
    files = [
        images for images in {id(s): s for s in sets}.values() if isinstance(images, FileImages)
    ]
    if sum(map(len, files)) < len(layout.paths):
        read = {images.file(i) for images in files for i in range(len(images))}
        unread += [path for path in layout.paths if path not in read]
    if not unread:
        return ()
    return (
        f"{tree.root}: {len(unread)} files that look like images are not read, such as "
        f"{', '.join(unread[:3])}",
    )


def class_names(tree: Tree, root: str, classes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The names of each class: its folder's, then words for it.

    The words come from a list beside the splits or above them, ``classes.txt``, ``words.txt`` or
    ``LOC_synset_mapping.txt`` (a folder's name, then its words, separated by commas), else for
    WordNet ids from ImageNet's list, and for CUB's ``001.Wren`` from the folder itself.
    """
    words: dict[str, tuple[str, ...]] = {wnid: (word,) for wnid, word in imagenet.words().items()}
    parts = root.split("/")
    above = ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts))]
    lists = ("classes.txt", "LOC_synset_mapping.txt", "words.txt")
    texts = [f"{place}{file}" for place in reversed(above) for file in lists]
    there = set(texts) & set(tree.files)
    for text in [text for text in texts if text in there][:1]:
        for line in tree.read(text).decode("utf-8-sig", "replace").splitlines():
            folder, _, rest = line.strip().replace("\t", " ").partition(" ")
            words[folder] = tuple(word.strip() for word in rest.split(",") if word.strip())
    numbered = {name: match[1] for name in classes if (match := NUMBERED.fullmatch(name))}
    words |= {name: (word.replace("_", " "),) for name, word in numbered.items()}
    return tuple((name, *words.get(name, ())) for name in classes)
