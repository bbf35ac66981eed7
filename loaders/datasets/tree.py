"""Files by relative path, whether they lie in a folder or in an archive.

Paths are relative, with forward slashes and in Unicode form C, sorted by folder and then by name:
the same list on every file system, and torchvision's order. One rule holds for folders and all
archives: folders whose names start with a dot are not looked into; other hidden files, and those
that macOS, Windows and network storage put beside photographs, are kept in `hidden` and not read.
"""

from __future__ import annotations

import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path

from PIL import features

from letheon.errors import InputError, UnreadableImage
from letheon.regular import read_regular

# Matches the path of a file that is nobody's image, whatever its suffix.
HIDDEN = re.compile(r"(?:^|/)(?:\.|(?:__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN|lost\+found)(?:/|$))")
HIDDEN_MARKS = ("/.", "\n.", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE", "lost+found")
MAX_FILE = 2**28  # bytes of one file; a photograph is far below
DOT_FOLDER = re.compile(r"(?:^|/)\.[^/]+/")

# What Pillow decodes, and what else is an image by its name and is told to be left out.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tif", ".tiff", ".gif", ".jp2", *((".avif",) if features.check("avif") else ()),
)  # fmt: skip
UNREAD_SUFFIXES = (
    ".avif", ".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".ico", ".dng", ".cr2", ".nef",
    ".arw", ".raw", ".exr", ".hdr", ".dcm", ".j2k", ".jpx", ".jif", ".apng", ".dib",
)  # fmt: skip


def looks_like_image(path: str) -> bool:
    """Whether the name is that of an image, be it of a kind that is read or not."""
    return path.lower().endswith(SUFFIXES + UNREAD_SUFFIXES)


def bytewise(paths: Iterable[str]) -> list[str]:
    """Sorted by folder, then by name, each by the bytes of its UTF-8 form."""
    return sorted(paths, key=_sort_key)


def _sort_key(path: str) -> bytes:
    folder, _, name = path.rpartition("/")
    return f"{folder}\0{name}".encode("utf-8", "surrogateescape")


class Tree(ABC):
    """The files below one root. Pickles without its lists: workers only `read`.

    Attributes:
        files: paths of the files to look at, sorted.
        folders: paths of the folders, those that hold nothing too.
        hidden: paths that are passed over: hidden files, a second Unicode form of a name, links
            that lead nowhere.
    """

    def __init__(
        self, root: Path, files: Iterable[str], folders: Iterable[str], lost: Iterable[str] = ()
    ) -> None:
        """`lost` are paths that cannot be read, such as links out of an archive."""
        self.root = root
        everything = list(files)
        text = "\n".join(("", *everything))  # a million paths are searched at once
        hidden: list[str] = []
        if any(mark in text for mark in HIDDEN_MARKS):
            hidden = [path for path in everything if HIDDEN.search(path)]
            out = set(hidden)
            everything = [path for path in everything if path not in out]
        self.files = bytewise(everything)
        self.folders = {path for path in folders if not HIDDEN.search(path)}
        self.hidden = [*(path for path in hidden if not DOT_FOLDER.search(path)), *lost]

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the file, uncompressed; raises `UnreadableImage` where there is none."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file; raises `UnreadableImage` naming it when it cannot be read."""

    def where(self, path: str) -> str:
        """What the file is called in messages."""
        return f"{self.root}/{path}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "files": [], "folders": set(), "hidden": [], "_open": None}


class Folder(Tree):
    """A directory; links are followed unless they loop."""

    def __init__(self, root: Path, tops: Collection[str] | None = None) -> None:
        """With `tops`, only these of the folders directly in `root` are looked into."""
        files: list[str] = []
        folders: list[str] = []
        lost: list[str] = []
        self._real: dict[str, str] = {}  # where the name on disk is not in form C
        for base, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
            below = Path(base).relative_to(root).as_posix()
            rings = {n for n in inner if not n.startswith(".") and _loops(root, base, n)}
            lost += [f"{below}/{n}".removeprefix("./") for n in rings]
            inner[:] = [n for n in inner if not n.startswith(".") and n not in rings]
            if tops is not None and below == ".":
                inner[:] = [n for n in inner if unicodedata.normalize("NFC", n) in tops]
            prefix = "" if below == "." else f"{below}/"
            folders += [self._note(prefix + name) for name in inner]
            files += [self._note(prefix + name) for name in names]
        if self._real:  # a name may be there in both Unicode forms
            seen: set[str] = set()
            lost += [path for path in files if path in seen or seen.add(path)]  # type: ignore[func-returns-value]
            files = list(dict.fromkeys(files))
        super().__init__(root, files, folders, lost)

    def _note(self, real: str) -> str:
        path = unicodedata.normalize("NFC", real)
        if path != real:
            self._real[path] = real
        return path

    def size(self, path: str) -> int:
        """Bytes of the file; raises `UnreadableImage` where it is gone."""
        try:
            return (self.root / self._real.get(path, path)).stat().st_size
        except OSError as error:
            raise self._unreadable(path, error) from None

    def read(self, path: str) -> bytes:
        """The whole file; raises `UnreadableImage` naming it when it cannot be read."""
        try:
            return read_regular(self.root / self._real.get(path, path), MAX_FILE)
        except OSError as error:
            raise self._unreadable(path, error) from None

    def _unreadable(self, path: str, error: OSError) -> UnreadableImage:
        return UnreadableImage(f"{self.where(path)}: cannot be read ({error.strerror})")


class Bundle(Tree):
    """Several trees below one root, each in a folder of its own: the archives of a download."""

    def __init__(self, root: Path, folder: Tree, parts: dict[str, Tree]) -> None:
        """`parts` has the tree of each archive by the folder it stands for; `folder` the rest."""
        self._folder, self._parts = folder, parts
        files, folders, lost = list(folder.files), list(folder.folders), list(folder.hidden)
        for prefix, tree in parts.items():
            files += [f"{prefix}/{path}" for path in tree.files]
            folders += [prefix, *(f"{prefix}/{path}" for path in tree.folders)]
            lost += [f"{prefix}/{path}" for path in tree.hidden]
        super().__init__(root, files, folders, lost)

    def size(self, path: str) -> int:
        """Bytes of the file, uncompressed."""
        tree, inner = self._find(path)
        return tree.size(inner)

    def read(self, path: str) -> bytes:
        """The whole file; raises `UnreadableImage` naming it when it cannot be read."""
        tree, inner = self._find(path)
        return tree.read(inner)

    def _find(self, path: str) -> tuple[Tree, str]:
        at = path.find("/")
        while at > 0:
            if path[:at] in self._parts:
                return self._parts[path[:at]], path[at + 1 :]
            at = path.find("/", at + 1)
        return self._folder, path


def _loops(root: Path, base: str, name: str) -> bool:
    """Whether the folder is a link to one of those on the way to it, or to one that holds these."""
    path = os.path.join(base, name)
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path) + os.sep
    way = Path(base)
    folders = [way, *(above for above in way.parents if above.is_relative_to(root))]
    return any((os.path.realpath(folder) + os.sep).startswith(target) for folder in folders)


def _refuse(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: cannot be read ({error.strerror}), expected a readable folder; "
        "check its permissions"
    )
