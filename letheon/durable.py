"""Files that are whole or absent: the one place that writes, flushes and renames."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from letheon.errors import RunFailed

PARTIAL = ".partial"
"""Ending of a file on its way; such a file is never read and may be deleted."""


@contextmanager
def disk_errors(path: Path, size: int = 0) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into the one line a user can act on.

    Args:
        path: the file or folder that is written.
        size: bytes it is to have, where they are known: a full disk then says how many it lacks.

    Raises:
        RunFailed: naming the file, and the bytes that are missing.
    """
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"got {error.strerror or error} while writing {path}{_missing(path, size, error)}; "
            "expected room and a disk that can be written; free space or name another place, and "
            "run again"
        ) from error


def _missing(path: Path, size: int, error: OSError) -> str:
    """Say how much room a full disk lacks; nothing of other errors."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    nearest = next((folder for folder in path.parents if folder.is_dir()), None)
    if nearest is None:
        return ""
    free = shutil.disk_usage(nearest).free
    if size <= free:  # a quota, or a size that is not known
        return f", {free:,} bytes free"
    return f" of {size:,} bytes, {free:,} bytes free: {size - free:,} are missing"


@contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[Path]:
    """Write the file that is yielded; it becomes `path`, all or nothing, even if the machine stops.

    At the end file and folder are flushed to disk. An existing `path` is replaced in one step.
    If the block raises, `path` is as it was and nothing of ours is left.

    Args:
        path: the file.
        size: bytes it is to have, if known, for the message about a full disk.

    Raises:
        RunFailed: the disk is full or went away; OSErrors of the block itself included.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with disk_errors(path, size):
            try:
                yield temporary
                flush(temporary)
                temporary.replace(path)
                flush(path.parent)
            except OSError:
                with suppress(OSError):  # the room is measured after it is gone
                    temporary.unlink(missing_ok=True)
                raise
    except BaseException:
        with suppress(OSError):  # a disk that went away: the first error says it
            temporary.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8), as `replacing` does."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)


def flush(path: Path) -> None:
    """Push a file, or a folder's list of names, from the system's memory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
