"""Output folders: one process at a time works for one, and a new one replaces it as a whole.

    with lock(out):
        settle(out, mark, own)
        ...write to new_folder(out), the file `mark` last...
        publish(out, own)

Beside an output NAME lie, while they are needed, `.NAME.lock`, `.NAME.new` (the folder on its
way), `.NAME.old` (the one it replaces), `.NAME.state` (what is saved of a file on its way) and
`.NAME.ranking` (what is saved of the ranking that its request needs). A process that dies at any
instant leaves NAME whole, or a state that the next `settle` completes or undoes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from letheon.durable import disk_errors, flush
from letheon.errors import InputError
from letheon.regular import open_regular

LOCK = ".lock"
"""Name of the lock inside an output folder that has no writable folder around it."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_locks: set[Path] = set()  # locks of this process, which the system would grant it twice


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder or file; no other process gets it meanwhile.

    The lock is the system's own on an open file, so it ends with its process, whatever ends that.
    Helper processes do not inherit it. It holds between machines on NFS from version 4 on, and on
    file systems such as Lustre where they are mounted with locks; where there are none a line on
    stderr says so, and the work goes on without.

    Raises:
        InputError: another process holds it, which the message names; or nothing can be written.
    """
    file = _lock_file(out)
    if file in _locks:
        raise _busy(out, f"process {os.getpid()} on {socket.gethostname()}")
    above = [folder for folder in file.parents if not folder.exists()]
    try:
        handle = _open_lock(out, file)
    except OSError as error:
        raise InputError(
            f"got {out}, and {file.parent} cannot be written ({error.strerror}); expected a folder "
            "that can; name another place",
            option="out",
        ) from error
    _locks.add(file)
    try:
        yield
    finally:
        _locks.remove(file)
        with suppress(OSError):  # a file that stays is no harm: it is not locked
            if file.stat().st_ino == os.fstat(handle).st_ino:
                file.unlink()
        os.close(handle)
        for folder in above:  # that were made for the lock, and hold nothing else
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def wait_for_lock(file: Path) -> Iterator[None]:
    """Hold the lock of a file of its own, which is made and stays, once no other process does.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    with file.open("w") as handle:
        fcntl.lockf(handle, fcntl.LOCK_EX)
        yield


def _lock_file(out: Path) -> Path:
    """Beside the output, or inside a folder that is mounted or lies in a read-only one."""
    place = out.resolve()
    if place.is_dir() and (place.is_mount() or not os.access(place.parent, os.W_OK)):
        return place / LOCK
    return place.parent / f".{place.name}.lock"


def _open_lock(out: Path, file: Path) -> int:
    """Open and lock the file, and write into it who holds it."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(handle, 200).decode(errors="replace").strip()
                os.close(handle)
                raise _busy(out, holder or "another process") from None
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            print(
                f"note: {file.parent} has no locks ({error.strerror}); another run that writes "
                f"{out} at the same time would not be noticed",
                file=sys.stderr,
            )
        try:
            same = file.stat().st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(handle)  # its holder has removed it in between
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def lock_holder(name: str, folder: int) -> str:
    """Name the process that works on an output, by its lock; empty where none does.

    Reads alone: the lock is asked for, not tried. Where it cannot be asked for (other systems than
    Linux), a lock file that is there counts. Not for a lock of this process, which this would end.

    Args:
        name: of the output.
        folder: descriptor of the folder that the output lies in.
    """
    try:
        with open_regular(f".{name}.lock", folder) as file:
            holder = file.read(200).decode(errors="replace").strip() or "another process"
            if sys.platform != "linux":
                return holder
            wish = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, wish)
            return "" if struct.unpack("hhqqi", answer)[0] == fcntl.F_UNLCK else holder
    except OSError:
        return ""


def _busy(out: Path, holder: str) -> InputError:
    return InputError(
        f"got {out}; {holder} is working on it; wait until it has ended, or name another place",
        option="out",
    )


def can_replace(out: Path) -> bool:
    """Whether an output folder can be renamed: it is no mount, and the folder above is writable."""
    return _lock_file(out).name != LOCK


def new_folder(out: Path) -> Path:
    """Return the folder that is to replace `out`, `.NAME.new` beside it; it may not exist yet."""
    return _beside(out, "new")


def state_folder(out: Path) -> Path:
    """Return the folder of what is saved of an output file on its way, `.NAME.state` beside it."""
    return _beside(out, "state")


def ranking_folder(out: Path) -> Path:
    """Return the folder of what is saved of a request's ranking, `.NAME.ranking` beside `out`."""
    return _beside(out, "ranking")


def free_path(wish: Path) -> Path:
    """Return `wish`, or `wish`-2, -3, ...: the first at which nothing lies or is on its way."""
    kinds = ("new", "old", "state", "ranking", "lock")
    count, path = 1, wish
    while any(os.path.lexists(one) for one in (path, *(_beside(path, kind) for kind in kinds))):
        count += 1
        path = wish.with_name(f"{wish.name}-{count}")
    return path


def clear_new_folder(out: Path) -> None:
    """Delete the folder that was to replace `out`, if there is one.

    Raises:
        RunFailed: it cannot be deleted.
    """
    folder = new_folder(out)
    with disk_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)


def publish(out: Path, own: Collection[str]) -> None:
    """Put the new folder in the place of `out`, by renames.

    Args:
        out: the folder to replace; it may be absent.
        own: patterns of the files that Letheon writes in such a folder: of the replaced one these
            are deleted, and all others, which are somebody else's, are carried over.

    Raises:
        RunFailed: a rename failed; `out` is as it was.
    """
    place, new, old = out.resolve(), new_folder(out), _beside(out, "old")
    with disk_errors(place):
        if place.exists():
            os.rename(place, old)
        try:
            os.rename(new, place)
        except OSError:
            if old.exists():
                os.rename(old, place)
            raise
        flush(place.parent)
        _discard(old, place, own)


def settle(out: Path, mark: str, own: Collection[str]) -> None:
    """Complete or undo a replacement of `out` that was interrupted; call it under the lock.

    A new folder that is whole (the file `mark` is in it) takes its place; the old one comes back
    where the new one is not whole. A new folder that is not whole stays, for who goes on with it.

    Args:
        out: the folder that was replaced.
        mark: the file that is written last.
        own: as in `publish`.

    Raises:
        RunFailed: the disk refuses.
    """
    place, new, old = out.resolve(), new_folder(out), _beside(out, "old")
    whole = (new / mark).is_file()
    with disk_errors(place):
        if old.exists() and not place.exists() and not whole:
            os.rename(old, place)
        if old.exists() and place.exists():
            _discard(old, place, own)
        if whole and old.exists():
            os.rename(new, place)
            _discard(old, place, own)
        elif whole:
            publish(out, own)


def remove_own(folder: Path, own: Collection[str]) -> None:
    """Delete the files of a folder that match the patterns `own`."""
    with disk_errors(folder):
        for path in folder.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in own):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _discard(old: Path, place: Path, own: Collection[str]) -> None:
    """Delete a replaced folder; what is not ours in it moves to its successor."""
    if not old.exists():
        return
    remove_own(old, own)
    for path in old.iterdir():
        if not (place / path.name).exists():
            os.rename(path, place / path.name)
    shutil.rmtree(old)
    flush(place.parent)


def _beside(out: Path, kind: str) -> Path:
    place = out.resolve()
    return place.parent / f".{place.name}.{kind}"
