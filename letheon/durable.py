"""Files that are whole or absent: the one place that writes, flushes and renames."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from letheon.errors import RunFailed

PARTIAL = ".partial"
"""Ending of a file on its way; such a file is never read and may be deleted."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write the file that is yielded; it becomes `path`, all or nothing, even if the machine stops.

    At the end file and folder are flushed to disk. An existing `path` is replaced in one step.
    If the block raises, `path` is as it was and nothing of ours is left.

    Raises:
        RunFailed: the disk is full or went away; OSErrors of the block itself included.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFailed(
            f"got {error.strerror or error} while writing {path}; expected room and a disk that "
            "can be written; free space or name another place, and run again"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8), as `replacing` does."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def flush(path: Path) -> None:
    """Push a file, or a folder's list of names, from the system's memory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
