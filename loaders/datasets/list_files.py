"""Domains by list files: DomainNet-126's and DomainNet's, which name the images and their labels.

``<domain>_list.txt``, or its halves ``<domain>_train.txt`` and ``<domain>_test.txt``, lie beside
the folders of the domains or in one folder there (``image_list/``). A line is an image's path from
the folder that holds the domains, then its label: ``real/bird/real_032_000265.jpg 11``. What no
list names is not read. Lists: Saito et al. 2019 (126 classes), Peng et al. 2019 (345).
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from letheon.errors import InputError
from letheon.loaders.datasets.files import ListedImages
from letheon.loaders.datasets.image_set import MAX_CLASSES, ImageSet
from letheon.loaders.datasets.layouts import Layout, canonical, children
from letheon.loaders.datasets.tree import MAX_FILE, SUFFIXES, Folder, Tree, bytewise
from letheon.regular import read_regular

NAME = re.compile(r"(.+)_(list|train|test)\.txt")


class Line(NamedTuple):
    """One line of a list."""

    path: str  # from the folder that holds the domains, in Unicode form C
    label: int
    name: str  # of the list
    number: int  # of the line, from 1

    @property
    def where(self) -> str:
        """What the line is called in messages."""
        return f"{self.name}, line {self.number}"


def lists_beside(tree: Tree, layout: Layout) -> dict[str, ImageSet] | None:
    """The listed domains of a folder or an archive; None where no list lies beside its domains.

    Raises:
        InputError: A list that is broken or names what is not there, or lists in two places.
    """
    if layout.kind == "splits":
        return None
    texts = [path for path in tree.files if NAME.fullmatch(path.rpartition("/")[2])]
    if not texts:
        return None
    parts = layout.root.split("/")
    # With one domain the common folder of all images lies below the one that holds the domains.
    for depth in range(len(parts) - 1, -1, -1):
        root = "".join(f"{part}/" for part in parts[:depth])
        folders = children(tree, layout.paths, root)
        near = [t for t in texts if t.startswith(root) and t.count("/", len(root)) <= 1]
        found = [text for text in near if _domain(text) in folders]
        places = bytewise({text.rpartition("/")[0] for text in found})
        if len(places) > 1:
            raise InputError(
                f"{tree.where(root)}: got lists of its domains in {_place(places[0])} and in "
                f"{_place(places[1])}, expected one place; name the folder of those to be read"
            )
        if places:
            others = [t for t in near if t not in found and t.rpartition("/")[0] == places[0]]
            found += [text for text in others if _lists_own_folder(tree, text)]
            return _sets(tree, root, {tree.where(text): tree.read(text) for text in found})
    return None


def open_lists(path: Path) -> dict[str, ImageSet] | None:
    """The domain of the list file at `path`, or those of a folder of lists; None if it is neither.

    The images lie beside the list or beside its folder.

    Raises:
        InputError: As `lists_beside`, or the images lie in neither place.
    """
    try:
        texts = _texts(path)
        lists = {str(text): read_regular(text, MAX_FILE) for text in texts}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not texts:
        return None
    tops = {line.path.partition("/")[0] for name in lists for line in _lines(name, lists[name])}
    here = texts[0].absolute().parent
    for root in (here, here.parent):
        if any((root / top).is_dir() for top in tops):
            return _sets(Folder(root, tops), "", lists)
    raise InputError(
        f"{path}: got images in {min(tops)}/, which is neither in {here} nor in {here.parent}, "
        "expected the folders of the domains in one of them; move the list there"
    )


def _texts(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".txt":
        return [path]
    inside = [p for p in path.iterdir() if p.name[0] != "."] if path.is_dir() else []
    if any(entry.is_dir() or entry.suffix.lower() in SUFFIXES for entry in inside):
        return []  # holds the images itself
    return sorted(entry for entry in inside if NAME.fullmatch(entry.name))


def _domain(text: str) -> str:
    match = NAME.fullmatch(text.rpartition("/")[2])
    return match[1] if match is not None else text.rpartition("/")[2].removesuffix(".txt")


def _place(folder: str) -> str:
    return f"{folder}/" if folder else "the folder itself"


def _lists_own_folder(tree: Tree, text: str) -> bool:
    """Whether the first line is an image in the folder of the list's domain, which is not there."""
    start = tree.read(text).decode("utf-8-sig", "replace").lstrip()
    return start.startswith(f"{_domain(text)}/")


def _lines(name: str, data: bytes) -> list[Line]:
    """What a list says; raises `InputError` naming the line that does not fit."""
    # Only the ends of lines split them: other separators may stand in a file name.
    text = io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=None)
    lines = []
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        *before, label = line.strip().rsplit(maxsplit=1)
        if not before or not re.fullmatch("[0-9]{1,9}", label) or int(label) >= MAX_CLASSES:
            raise InputError(
                f"{name}, line {number}: got {line.strip()[-80:]!r}, expected "
                f"<domain>/<class>/<image> and a label of 0..{MAX_CLASSES - 1}; mend the line"
            )
        path = unicodedata.normalize("NFC", before[0])
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path[0] == "/" or ".." in parts or "\\" in path or len(parts) < 2:
            raise InputError(
                f"{name}, line {number}: got the path {path!r}, expected "
                "<domain>/<class>/<image> from the folder of the domains, with forward slashes; "
                "mend the line"
            )
        lines.append(Line("/".join(parts), int(label), name, number))
    if not lines:
        raise InputError(f"{name}: got an empty list, expected an image a line; fill or remove it")
    return lines


def _sets(tree: Tree, root: str, lists: Mapping[str, bytes]) -> dict[str, ImageSet]:
    """The domains of `lists` (name -> content), sorted; classes and labels are those of all."""
    halves: dict[str, list[str]] = {}
    lines: dict[str, list[Line]] = {}
    for name, data in lists.items():
        domain = canonical(_domain(name))
        halves.setdefault(domain, []).append(name)
        lines.setdefault(domain, []).extend(_lines(name, data))
    for names in halves.values():
        whole = [name for name in names if name.endswith("_list.txt")]
        other = [name.rpartition("/")[2] for name in names if name not in whole[:1]]
        if whole and other:
            raise InputError(
                f"{whole[0]}: got {other[0]} beside it, which lists the same domain, expected "
                "one kind of list; move one kind into a folder of its own and name that"
            )
    classes = _classes([line for of_domain in lines.values() for line in of_domain])
    there = set(tree.files)
    out: dict[str, ImageSet] = {}
    for domain, of_domain in sorted(lines.items()):
        missing = [line for line in of_domain if root + line.path not in there]
        if missing:
            raise InputError(
                f"{missing[0].where}: got {missing[0].path!r}, which is not in {tree.where(root)} "
                f"({len(missing)} of {len(of_domain)} images of {domain} are missing), expected "
                "every listed image; unpack the domain there, or remove what is not to be read"
            )
        of_domain.sort(key=lambda line: line.path.encode("utf-8", "surrogateescape"))
        paths = [root + line.path for line in of_domain]
        out[domain] = ListedImages(
            domain, tree, paths, [line.label for line in of_domain], classes, root
        )
    return out


def _classes(lines: Sequence[Line]) -> list[str]:
    """The class folder of each label, over all domains; a label that no line has is "(label)".

    Raises:
        InputError: An image listed twice, a label for two folders, or a folder with two labels.
    """
    first: dict[str, Line] = {}
    folders: dict[int, str] = {}
    labels: dict[str, int] = {}
    for line in lines:
        before = first.setdefault(line.path, line)
        if before is not line:
            raise InputError(
                f"{line.where}: got {line.path!r}, which {before.where} lists already, expected "
                "each image once; remove one of the lines"
            )
        folder = line.path.split("/")[-2]
        other = folders.setdefault(line.label, folder)
        label = labels.setdefault(folder, line.label)
        if other != folder or label != line.label:
            known = f"label {label}" if label != line.label else f"the label for {other!r}"
            raise InputError(
                f"{line.where}: got label {line.label} for the folder {folder!r}, where an earlier "
                f"line has {known}, expected one label a folder in all lists; mend the lists"
            )
    return [folders.get(label, f"({label})") for label in range(max(folders) + 1)]
