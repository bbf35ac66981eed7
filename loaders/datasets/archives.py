"""A zip or a tar read in place, member by member.

Nothing is unpacked, so an archive can write nowhere; one whose members point outside it is refused
all the same.
"""

from __future__ import annotations

import io
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path, PurePosixPath

from letheon.errors import InputError, UnreadableImage
from letheon.loaders.datasets.tree import Folder, Tree

MAX_FILE = 2**28  # bytes of one member; a photograph is far below
MAX_UNPACKED = 2**30  # bytes of a compressed tar, which has to be held in memory
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class Zip(Tree):
    """A zip archive; each process opens it for itself."""

    def __init__(self, root: Path) -> None:
        try:
            with zipfile.ZipFile(root) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise _broken(root, error) from None
        self._sizes = {_safe(root, e.filename): e.file_size for e in entries if not e.is_dir()}
        self._names = {_safe(root, e.filename): e.filename for e in entries if not e.is_dir()}
        self._open: tuple[int, zipfile.ZipFile] | None = None
        folders = [_safe(root, e.filename.rstrip("/")) for e in entries if e.is_dir()]
        super().__init__(root, self._sizes, folders)

    def size(self, path: str) -> int:
        """Bytes of the member, uncompressed."""
        return self._sizes[path]

    def read(self, path: str) -> bytes:
        """The member; raises `UnreadableImage` naming it when it cannot be read or is too large."""
        _check_size(self, path)
        try:
            if self._open is None or self._open[0] != os.getpid():
                self._open = (os.getpid(), zipfile.ZipFile(self.root))
            return self._open[1].read(self._names[path])
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError) as error:
            raise UnreadableImage(str(_broken(self.where(path), error))) from None


class Tar(Tree):
    """A tar archive: members of a plain one are read where they lie, a compressed one from memory.

    Hard links are followed inside the archive; other links and special files are left out.
    """

    def __init__(self, root: Path) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._held: dict[str, bytes] = {}
        self._open: io.FileIO | None = None
        folders: list[str] = []
        total = 0
        try:
            with tarfile.open(root) as archive:
                in_memory = root.name.endswith(COMPRESSED)
                for member in archive:
                    path = _safe(root, member.name)
                    if member.isdir():
                        folders.append(path)
                    elif member.islnk():
                        target = _safe(root, member.linkname)
                        self._places[path] = self._places[target]
                        if in_memory:
                            self._held[path] = self._held[target]
                    elif member.isreg():
                        self._places[path] = (member.offset_data, member.size)
                        total += member.size
                        if in_memory:
                            _check_total(root, total)
                            stream = archive.extractfile(member)
                            assert stream is not None
                            self._held[path] = stream.read()
        except (tarfile.TarError, OSError, EOFError, KeyError) as error:
            raise _broken(root, error) from None
        super().__init__(root, self._places, folders)

    def size(self, path: str) -> int:
        """Bytes of the member, uncompressed."""
        return self._places[path][1]

    def read(self, path: str) -> bytes:
        """The member; raises `UnreadableImage` naming it when it cannot be read or is too large."""
        _check_size(self, path)
        if self._held:
            return self._held[path]
        offset, size = self._places[path]
        if self._open is None:
            self._open = io.FileIO(self.root)
        data = os.pread(self._open.fileno(), size, offset)  # no shared position: safe after a fork
        if len(data) != size:
            raise UnreadableImage(str(_broken(self.where(path), "cut short")))
        return data


def open_tree(path: Path) -> Tree:
    """The folder or archive at `path`; raises `InputError` if it is neither or does not exist."""
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise InputError(
            f"got {path}, which does not exist, expected a folder or an archive of images; "
            "check the path"
        )
    if path.suffix == ".zip":
        return Zip(path)
    if path.name.endswith((".tar", *COMPRESSED)):
        return Tar(path)
    raise InputError(
        f"got {path}, expected a folder, a .zip or a .tar of images; unpack or convert it"
    )


def _safe(root: Path, name: str) -> str:
    """The member's path in form C; raises `InputError` if it leads outside the archive."""
    path = PurePosixPath(unicodedata.normalize("NFC", name))
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise InputError(
            f"{root}: got a member named {name!r}, which leads outside, expected relative paths; "
            "do not use this archive"
        )
    return path.as_posix()


def _check_size(tree: Tree, path: str) -> None:
    if tree.size(path) > MAX_FILE:
        raise UnreadableImage(
            f"{tree.where(path)}: got {tree.size(path)} bytes, expected an image of at most "
            f"{MAX_FILE}; remove it"
        )


def _check_total(root: Path, total: int) -> None:
    if total > MAX_UNPACKED:
        raise InputError(
            f"{root}: got a compressed tar of over {MAX_UNPACKED >> 30} GiB, expected a plain "
            ".tar, which is read in place; unpack it"
        )


def _broken(where: object, error: object) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{where}: broken archive ({reason}), expected a whole one; fetch it again")
