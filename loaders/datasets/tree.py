"""Files by relative path, whether they lie in a folder or in an archive.

Paths are relative, with forward slashes and in Unicode form C, sorted bytewise: the same
list on every file system.
"""

from __future__ import annotations

import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path

from letheon.errors import InputError, UnreadableImage


def bytewise(paths: Iterable[str]) -> list[str]:
    """Sorted by the bytes of the UTF-8 form."""
    return sorted(paths, key=lambda path: path.encode("utf-8", "surrogateescape"))


class Tree(ABC):
    """The files below one root. Pickles without its lists: workers only `read`."""

    def __init__(self, root: Path, files: Iterable[str], folders: Iterable[str]) -> None:
        self.root = root
        self.files = bytewise(files)
        self.folders = set(folders)  # those that hold nothing too

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the file, uncompressed."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file; raises `UnreadableImage` naming it when it cannot be read."""

    def where(self, path: str) -> str:
        """What the file is called in messages."""
        return f"{self.root}/{path}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "files": [], "folders": set(), "_open": None}


class Folder(Tree):
    """A directory; names that start with a dot are left out, links followed unless they loop."""

    def __init__(self, root: Path, tops: Collection[str] | None = None) -> None:
        """With `tops`, only these of the folders directly in `root` are looked into."""
        files: list[str] = []
        folders: list[str] = []
        self._real: dict[str, str] = {}  # where the name on disk is not in form C
        for base, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
            inner[:] = [n for n in inner if not n.startswith(".") and not _loops(base, n)]
            below = Path(base).relative_to(root).as_posix()
            if tops is not None and below == ".":
                inner[:] = [n for n in inner if unicodedata.normalize("NFC", n) in tops]
            prefix = "" if below == "." else f"{below}/"
            folders += [self._note(prefix + name) for name in inner]
            files += [self._note(prefix + n) for n in names if not n.startswith(".")]
        super().__init__(root, files, folders)

    def _note(self, real: str) -> str:
        path = unicodedata.normalize("NFC", real)
        if path != real:
            self._real[path] = real
        return path

    def size(self, path: str) -> int:
        """Bytes of the file."""
        return (self.root / self._real.get(path, path)).stat().st_size

    def read(self, path: str) -> bytes:
        """The whole file; raises `UnreadableImage` naming it when it cannot be read."""
        try:
            return (self.root / self._real.get(path, path)).read_bytes()
        except OSError as error:
            raise UnreadableImage(
                f"{self.where(path)}: cannot be read ({error.strerror})"
            ) from None


def _loops(base: str, name: str) -> bool:
    """Whether the folder is a link to one of those it lies in."""
    path = os.path.join(base, name)
    if not os.path.islink(path):
        return False
    return (os.path.realpath(base) + os.sep).startswith(os.path.realpath(path) + os.sep)


def _refuse(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: cannot be read ({error.strerror}), expected a readable folder; "
        "check its permissions"
    )
