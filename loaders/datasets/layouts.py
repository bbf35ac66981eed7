"""Image folders and archives: which layout it is, and the image sets in it.

Layouts, found by their paths alone (one folder round everything is looked through):

- splits: ``train/<class>/`` with ``test/``, ``val/`` or ``valid/`` (ImageNet's, CIFAR's as JPEGs)
- domains: ``<domain>/<class>/`` (Office-Home's)
- classes: ``<class>/``, one domain (CUB's)
- flat: ``<wnid>_<name>.JPEG``, no folders; classes are the sorted WordNet ids
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from letheon.errors import InputError
from letheon.loaders.datasets import imagenet
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.datasets.tree import Tree, bytewise

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")
HELD_OUT = ("test", "val", "valid", "validation")
FLAT = re.compile(r"(n\d{8})_(.+)\.[^.]+$")


class Layout(NamedTuple):
    """What was found: the kind, the folder round everything, and the image paths below it."""

    kind: Literal["splits", "domains", "classes", "flat"]
    root: str  # "" or "folder/.../"
    paths: list[str]  # relative to the tree, sorted
    folders: list[str]  # the folders directly below the root, sorted


def recognize_layout(tree: Tree) -> Layout:
    """The layout of the images in `tree`; raises `InputError` when there are none."""
    paths = [p for p in tree.files if p.lower().endswith(SUFFIXES) and "__MACOSX/" not in p]
    if not paths:
        raise InputError(
            f"{tree.root}: got no image, expected {', '.join(SUFFIXES)} files in class folders; "
            "check the path"
        )
    root = ""
    while len(tops := {path[len(root) :].partition("/")[0] for path in paths}) == 1:
        (top,) = tops
        if top == "train" or f"{root}{top}" == paths[0]:
            break
        root += f"{top}/"
    depths = {path.count("/", len(root)) for path in paths}
    folders = bytewise(children(tree, paths, root))
    if "train" in folders:
        return Layout("splits", root, paths, folders)
    if depths == {0}:
        return Layout("flat", root, paths, folders)
    return Layout("classes" if 1 in depths else "domains", root, paths, folders)


def children(tree: Tree, paths: Sequence[str], root: str) -> set[str]:
    """Names of the folders directly below `root`, empty ones too."""
    below = [p[len(root) :].partition("/") for p in paths if p.startswith(root)]
    empty = [p[len(root) :].partition("/")[0] for p in tree.folders if p.startswith(root)]
    return {top for top, slash, _ in below if slash} | {top for top in empty if top} - {"__MACOSX"}


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
    ranks = {c: rank for rank, c in enumerate(found if classes is None else classes)}
    return FileImages(name, tree, paths, [ranks[n] for n in names], list(ranks), layout.root)


def splits(tree: Tree, layout: Layout) -> Data:
    """Train and held-out images; of several held-out splits, the first with train's classes."""
    name = tree.root.name
    train = class_set(tree, layout, f"{layout.root}train/", f"{name}/train")
    wanted = bytewise(children(tree, layout.paths, f"{layout.root}train/"))
    there = [split for split in HELD_OUT if split in layout.folders]
    for split in there:
        root = f"{layout.root}{split}/"
        found = bytewise(children(tree, layout.paths, root))
        if found == wanted:
            others = [other for other in there if other != split]
            notes = tuple(f"{other}/ is there too and is not read" for other in others)
            test = class_set(tree, layout, root, f"{name}/{split}")
            return Data(train, test, class_names(tree, layout, train.classes), notes)
    if not there:
        raise InputError(
            f"{tree.root}: got train/ alone, expected {', '.join(HELD_OUT[:-1])} beside it; "
            "add held-out images"
        )
    found = bytewise(children(tree, layout.paths, f"{layout.root}{there[0]}/"))
    differ = bytewise(set(found) ^ set(wanted))
    raise InputError(
        f"{tree.root}: got {len(wanted)} classes in train/ and {len(found)} in {there[0]}/ "
        f"({differ[0]!r} is in one alone), expected the same; add or remove class folders"
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
    """One folder of ``<wnid>_<name>`` files; there is nothing held out, so test is train."""
    words: dict[str, str] = {}
    wnids: list[str] = []
    for path in layout.paths:
        match = FLAT.match(path[len(layout.root) :])
        if match is None:
            raise InputError(
                f"{tree.where(path)}: got an image outside any folder, expected <split>/<class>/, "
                "<domain>/<class>/, <class>/ or names like n01440764_tench.JPEG; sort it in"
            )
        wnids.append(match[1])
        words.setdefault(match[1], match[2].replace("_", " "))
    classes = bytewise(words)
    ranks = {wnid: rank for rank, wnid in enumerate(classes)}
    labels = [ranks[wnid] for wnid in wnids]
    images = FileImages(tree.root.name, tree, layout.paths, labels, classes, layout.root)
    names = tuple((wnid, words[wnid]) for wnid in classes)
    return Data(images, images, names, ("nothing is held out: test is the same as train",))


def class_names(tree: Tree, layout: Layout, classes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The names of each class: its folder's, then words for it.

    The words come from a list beside the splits, ``classes.txt`` or ``LOC_synset_mapping.txt`` (a
    folder's name, then its words, separated by commas), else for WordNet ids from ImageNet's list.
    """
    words: dict[str, tuple[str, ...]] = {wnid: (word,) for wnid, word in imagenet.words().items()}
    for file in ("classes.txt", "LOC_synset_mapping.txt"):
        if f"{layout.root}{file}" in tree.files:
            text = tree.read(f"{layout.root}{file}").decode("utf-8-sig", "replace")
            for line in text.splitlines():
                folder, _, rest = line.strip().replace("\t", " ").partition(" ")
                words[folder] = tuple(word.strip() for word in rest.split(",") if word.strip())
            break
    return tuple((name, *words.get(name, ())) for name in classes)
