"""Walk the folders below one, and list again only those whose names have changed.

A folder's time changes when a name in it comes, goes or is replaced, so one look at it tells
whether its listing still holds. No link is followed: every folder is opened by its descriptor.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from letheon.engine.runs.loggers import TENSORBOARD
from letheon.engine.runs.run_folder import FAILED, FINISHED, LOG, ORIGIN, STATE
from letheon.eval.finished_rows import ROWS
from letheon.eval.report.write import PAGE
from letheon.regular import open_folder

TABLE = "metrics.json"
SETTINGS, REQUEST, VERSIONS = "settings.json", "request.json", "versions.json"
RECORDS = frozenset({FINISHED, FAILED, ORIGIN, SETTINGS, LOG})
"""A folder with one of these is a run's."""
FILES = (*sorted(RECORDS), REQUEST, VERSIONS, TABLE, PAGE)
"""What is read of a folder."""
_DEPTH = 5  # folders in one another
MOST = 200_000
"""Names that are looked at."""
_SETTLED = 2.0  # seconds: file systems note times no finer, and their clock may differ a little
_LOCK = re.compile(r"\.(.+)\.lock")  # of an output, beside it


@dataclass
class Listing:
    """What is known of the names in a folder, as they were at `stamp`."""

    stamp: tuple[int, int]
    """Number and time of the folder; nothing of it holds where they have changed."""
    settled: bool
    """Whether that time was past when it was listed: else a later change may have the same."""
    count: int = 0
    """Names in it; those beyond `MOST` are not read."""
    files: set[str] = field(default_factory=set)
    """Those of `FILES`."""
    below: list[str] = field(default_factory=list)
    """Folders in it that are looked into, in order."""
    links: list[str] = field(default_factory=list)
    """Links other than `FILES`."""
    locks: dict[str, str] = field(default_factory=dict)
    """Output that a lock file is of -> folder in which it is written."""
    rows: int = 0
    """Finished rows of an evaluation."""


class Place(NamedTuple):
    """A folder on the way; its descriptor is open until the next is asked for."""

    path: str
    folder: int
    listing: Listing
    same: bool
    """Whether no name in it has changed since the listing that was known."""


def join(path: str, name: str) -> str:
    """Join a path and a name; the path of the top is empty."""
    return f"{path}/{name}" if path else name


def walk(
    folder: int,
    known: Mapping[str, Listing] | None = None,
    only: str | None = None,
    path: str = "",
    depth: int = 0,
) -> Iterator[Place]:
    """Yield the folders below one, it first.

    Args:
        folder: descriptor of the folder, which is closed at the end.
        known: listings by path, which are taken where the folder has not changed since.
        only: a path; then the folders on the way to it alone, and what an evaluation keeps beside.
        path: of the folder.
        depth: of the folder.
    """
    try:
        of = os.fstat(folder)
        stamp = of.st_ino, of.st_mtime_ns
        listing = (known or {}).get(path)
        same = listing is not None and listing.settled and listing.stamp == stamp
        if listing is None or not same:
            settled = time.time() - of.st_mtime_ns / 1e9 > _SETTLED
            listing = _list(folder, path, Listing(stamp, settled))
        yield Place(path, folder, listing, same)
        for name in listing.below if depth < _DEPTH else ():
            place = join(path, name)
            on_the_way = only is None or f"{only}/".startswith(f"{place}/")
            if on_the_way or place == f"{only}{ROWS}":
                with suppress(OSError):
                    yield from walk(open_folder(name, folder), known, only, place, depth + 1)
    finally:
        os.close(folder)


def _list(folder: int, path: str, listing: Listing) -> Listing:
    """Read the names in a folder."""
    locked = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            listing.count += 1
            if listing.count > MOST:
                break
            if name in FILES:
                listing.files.add(name)
            if lock := _LOCK.fullmatch(name):
                locked.append(lock[1])
            listing.rows += path.endswith(ROWS) and name.endswith(".json")
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    listing.below.append(name)
                elif entry.is_symlink() and name not in FILES:
                    listing.links.append(name)
    for name in locked:
        new = f".{name}.new"  # replaces what is there
        listing.locks[name] = new if new in listing.below else name
    listing.below = sorted(name for name in listing.below if _is_looked_into(name))
    return listing


def _is_looked_into(name: str) -> bool:
    hidden = name.startswith(".") and not name.endswith(".new")
    return not hidden and name not in (STATE, TENSORBOARD)
