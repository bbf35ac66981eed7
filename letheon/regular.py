"""Files that are read must be regular: a FIFO would hang a reader, a device feed it for ever."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

LARGEST = 2**28
"""Bytes of a file of text that is read; those that people write are far below."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_folder(name: Path | str, above: int | None = None) -> int:
    """Open a folder as a descriptor, which the caller closes; in the folder `above` no link is one.

    Raises:
        OSError: it is none, or cannot be read.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return os.open(name, flags | (0 if above is None else os.O_NOFOLLOW), dir_fd=above)


def open_regular(path: Path | str, folder: int | None = None) -> BufferedReader:
    """Open a regular file to read its bytes, or what a link to one leads to; never waits.

    Args:
        path: the file.
        folder: descriptor of the folder that it must lie in: then no link is followed.

    Raises:
        OSError: it cannot be read, or is of another kind, which its `strerror` says.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        flags |= 0 if folder is None else os.O_NOFOLLOW
        handle = os.open(path, flags, dir_fd=folder)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def require_regular(path: Path | str) -> None:
    """Check a file that another library opens by its name; raises as `open_regular`."""
    open_regular(path).close()


def read_text(path: Path | str) -> str:
    """Read a regular text file of at most `LARGEST` bytes as UTF-8, without a byte-order mark.

    Raises:
        OSError: as `read_regular`.
        UnicodeDecodeError: it is no text.
    """
    return read_regular(path, LARGEST).decode("utf-8-sig")


def read_regular(path: Path | str, largest: int, folder: int | None = None) -> bytes:
    """Read a regular file of at most `largest` bytes; `folder` as in `open_regular`.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    with open_regular(path, folder) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise OSError(errno.EFBIG, f"{size} bytes, over {largest}", str(path))
        return file.read()
