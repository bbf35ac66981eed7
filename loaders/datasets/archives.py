"""A zip or a tar read in place, member by member, told apart by content and not by suffix.

Nothing is unpacked, so an archive can write nowhere; one whose members point outside it is refused
all the same. Backslashes of zips made on Windows divide folders. The tars inside a tar, such as
ImageNet's of one class each, are read in place too, as folders.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import re
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from letheon.errors import InputError, UnreadableImage
from letheon.loaders.datasets.tree import MAX_FILE, Bundle, Folder, Tree, looks_like_image
from letheon.regular import open_regular

MAX_UNPACKED = 2**30  # bytes of a compressed tar, which has to be held in memory
MAX_LINKS = 8  # links that lead to links
MAX_NESTED = 8  # tars in one another
COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
OTHERS = {b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive", b"\x28\xb5\x2f\xfd": "zstd"}
# Longest first: the name without its suffix is the folder that the archive stands for.
NAMES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tbz2", ".tgz", ".txz", ".tar", ".zip")


class Zip(Tree):
    """A zip archive; each process opens it for itself. Links to other members are followed."""

    def __init__(self, root: Path) -> None:
        folders: list[str] = []
        links: dict[str, str] = {}
        self._members: dict[str, zipfile.ZipInfo] = {}
        try:
            with zipfile.ZipFile(root) as archive:
                for entry in archive.infolist():
                    path = _safe(root, entry.filename)
                    if entry.filename.endswith(("/", "\\")):
                        folders.append(path)
                    elif stat.S_ISLNK(entry.external_attr >> 16):
                        links[path] = _target(path, archive.read(entry).decode("utf-8", "replace"))
                    else:
                        self._members[path] = entry
        except (zipfile.BadZipFile, OSError, zlib.error, RuntimeError, ValueError) as error:
            raise _broken(root, error) from None
        lost = _follow(links, self._members)
        self._open: tuple[int, zipfile.ZipFile] | None = None
        super().__init__(root, self._members, folders, lost)

    def size(self, path: str) -> int:
        """Bytes of the member, uncompressed."""
        return self._members[path].file_size

    def read(self, path: str) -> bytes:
        """The member; raises `UnreadableImage` naming it when it cannot be read or is too large."""
        _check_size(self, path)
        try:
            if self._open is None or self._open[0] != os.getpid():
                self._open = (os.getpid(), zipfile.ZipFile(self.root))
            return self._open[1].read(self._members[path].orig_filename)
        except (
            zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError, zlib.error,
        ) as error:  # fmt: skip
            raise UnreadableImage(str(_broken(self.where(path), error))) from None


class Tar(Tree):
    """A tar archive: members of a plain one are read where they lie, a compressed one from memory.

    Links to other members are followed; special files are left out.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._places: dict[str, tuple[int, int]] = {}  # offset and bytes
        self._links: dict[str, str] = {}
        self._held: bytes | None = None
        self._open: io.FileIO | None = None
        self._folders: list[str] = []
        try:
            if _compression(root) is not None:
                self._held = _unpack(root)
            with root.open("rb") if self._held is None else io.BytesIO(self._held) as file:
                self._index(file, "")  # type: ignore[arg-type]
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise _broken(root, error) from None
        lost = _follow(self._links, self._places)
        super().__init__(root, self._places, self._folders, lost)

    def _index(
        self, file: io.BufferedReader, prefix: str, end: int | None = None, depth: int = 0
    ) -> None:
        """Note the members from the file's position on; those of a tar in it below its name."""
        if depth > MAX_NESTED:
            raise InputError(
                f"{self.root}: got tars in one another, over {MAX_NESTED} deep, expected fewer; "
                "unpack them"
            )
        nested: list[tuple[str, int, int]] = []
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if end is not None and member.offset >= end:
                    break
                path = prefix + _safe(self.root, member.name)
                if member.isdir():
                    self._folders.append(path)
                elif member.islnk():
                    self._links[path] = prefix + _safe(self.root, member.linkname)
                elif member.issym():
                    self._links[path] = _target(path, member.linkname)
                elif member.isreg() and path.endswith(".tar"):
                    nested.append((path, member.offset_data, member.size))
                elif member.isreg():
                    self._places[path] = (member.offset_data, member.size)
        for path, offset, size in nested:
            self._folders.append(path.removesuffix(".tar"))
            file.seek(offset)
            self._index(file, f"{path.removesuffix('.tar')}/", offset + size, depth + 1)

    def size(self, path: str) -> int:
        """Bytes of the member, uncompressed."""
        return self._places[path][1]

    def read(self, path: str) -> bytes:
        """The member; raises `UnreadableImage` naming it when it cannot be read or is too large."""
        _check_size(self, path)
        offset, size = self._places[path]
        if self._held is not None:
            data = self._held[offset : offset + size]
        else:
            if self._open is None:
                self._open = io.FileIO(self.root)
            # No shared position: safe after a fork.
            data = os.pread(self._open.fileno(), size, offset)
        if len(data) != size:
            raise UnreadableImage(str(_broken(self.where(path), "cut short")))
        return data


def open_tree(path: Path) -> Tree:
    """The folder or archive at `path`; raises `InputError` if it is neither or does not exist."""
    if path.is_dir():
        return _with_archives(Folder(path))
    if not path.exists():
        raise InputError(
            f"got {path}, which does not exist, expected a folder or an archive of images; "
            "check the path"
        )
    try:
        with open_regular(path) as file:
            start = file.read(8)
    except OSError as error:
        raise InputError(
            f"got {path}, which cannot be read ({error.strerror}), expected a folder, a .zip or a "
            ".tar of images; check the path"
        ) from None
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return Zip(path)
    if _compression(path) is not None or _is_tar(path):
        return Tar(path)
    known = next((what for magic, what in OTHERS.items() if start.startswith(magic)), None)
    if path.name.lower().endswith(NAMES) and known is None:
        raise _broken(path, "neither a zip nor a tar by its content")
    raise InputError(
        f"got {path}{f', which is {known}' if known else ''}, expected a folder, a .zip or a .tar "
        "of images; unpack or convert it"
    )


def _with_archives(folder: Folder) -> Tree:
    """`folder`, or where it holds archives and no image, what is in them as if unpacked there."""
    paths = [p for p in folder.files if p.lower().endswith(NAMES if "/" not in p else ".tar")]
    if not paths or any(looks_like_image(path) for path in folder.files):
        return folder
    parts: dict[str, Tree] = {}
    for path in paths:
        name = next(path[: -len(end)] for end in NAMES if path.lower().endswith(end))
        parts[name] = open_tree(folder.root / path)
    return Bundle(folder.root, folder, parts)


def _is_tar(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(512)
    return start[257:262] == b"ustar" or (path.name.lower().endswith(".tar") and len(start) == 512)


def _compression(path: Path) -> str | None:
    """What the file is compressed with, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(6)
    return next((what for magic, what in COMPRESSION.items() if start.startswith(magic)), None)


def _unpack(root: Path) -> bytes:
    """The plain tar in a compressed one.

    Raises:
        InputError: It is over `MAX_UNPACKED`.
    """
    openers: dict[str | None, Callable[[Path], Any]] = {
        "gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open
    }  # fmt: skip
    try:
        with openers[_compression(root)](root) as file:
            data: bytes = file.read(MAX_UNPACKED + 1)
    except lzma.LZMAError as error:
        raise _broken(root, error) from None
    if len(data) > MAX_UNPACKED:
        raise InputError(
            f"{root}: got a compressed tar of over {MAX_UNPACKED >> 30} GiB, expected a plain "
            ".tar, which is read in place; unpack it"
        )
    return data


def _safe(root: Path, name: str) -> str:
    """The member's path in form C; raises `InputError` if it leads outside the archive."""
    path = PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/")))
    if path.is_absolute() or ".." in path.parts or "\0" in name or re.match("[A-Za-z]:", name):
        raise InputError(
            f"{root}: got a member named {name!r}, which leads outside, expected relative paths; "
            "do not use this archive"
        )
    return path.as_posix()


def _target(path: str, link: str) -> str:
    """The member that a symbolic link in `path` names, seen from the archive's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _follow(links: dict[str, str], members: dict[str, Any]) -> list[str]:
    """Add to `members` what links lead to; the links that lead to no file of the archive."""
    lost = []
    for path in links:
        target = path
        for _ in range(MAX_LINKS):
            target = links.get(target, target)
        if target in members:
            members[path] = members[target]
        else:
            lost.append(path)
    return lost


def _check_size(tree: Tree, path: str) -> None:
    if tree.size(path) > MAX_FILE:
        raise UnreadableImage(
            f"{tree.where(path)}: got {tree.size(path)} bytes, expected an image of at most "
            f"{MAX_FILE}; remove it"
        )


def _broken(where: object, error: object) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{where}: broken archive ({reason}), expected a whole one; fetch it again")
