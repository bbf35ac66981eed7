"""Find the runs and tables below a folder, and read what they say of themselves.

Whatever lies there is somebody else's: no link is followed, only regular files of a bounded size
are read, and what is not as Letheon writes it becomes a reason in a row.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from letheon.engine.runs.loggers import parse_lines
from letheon.engine.runs.run_folder import FAILED, FINISHED, LOG
from letheon.errors import InputError
from letheon.eval.finished_rows import ROWS
from letheon.eval.metrics.reference import Band, Reference
from letheon.eval.report.write import PAGE
from letheon.folders import lock_holder
from letheon.launch.serving import walk as walking
from letheon.launch.serving.walk import (
    FILES,
    RECORDS,
    REQUEST,
    SETTINGS,
    TABLE,
    VERSIONS,
    Listing,
    join,
    walk,
)
from letheon.regular import open_folder, open_regular
from letheon.sealed import expect_shape, read_sealed

_LARGEST = 2**24  # bytes of a file
_LOG_END, _LINES = 2**22, 12  # bytes of a log that are read, from its end; reports that stay
_ROWS, _COLUMNS = 300, 200  # of a table
_TEXT = 300  # characters of a fact


@dataclass(frozen=True)
class Run:
    """What a run's folder says."""

    state: str
    """running, finished, failed, unfinished, damaged or not read."""
    note: str = ""
    """Why it failed, what is damaged, or who works on it."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Method, request, data, network, seed, host, by name."""
    epochs: float | None = None
    losses: Mapping[str, list[float]] = field(default_factory=dict)
    """Mean loss of each pass over images, by phase, where it is a number."""
    last_pass: Mapping[str, Any] = field(default_factory=dict)
    """The report of the last whole pass."""
    lines: Sequence[Mapping[str, Any]] = ()
    """The last reports of its log."""
    weights: str = ""
    """Their digest, by which a table knows them."""
    last_change: float = 0.0
    """Seconds since 1970 of its last sign."""


@dataclass(frozen=True)
class Table:
    """What an evaluation's folder says."""

    rows: Sequence[Mapping[str, Any]] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    reference: Reference | None = None
    """Bands of the retrained models, as they were computed with the rows."""
    page: Mapping[str, Any] = field(default_factory=dict)
    """Heading, facts and example images, where the evaluation had a page."""
    note: str = ""
    """Why it cannot be shown, or who works on it."""
    last_change: float = 0.0
    stamp: Any = ()
    """Differs when a file of its folder does."""


_Known = dict[str, tuple[Any, Run | Table]]
"""Path -> stamp of the files that were read, and what they say."""


class RunList:
    """The runs and tables below a folder, by their paths in it; what is unchanged is read once.

    Attributes:
        entries: what was found at the last look.
        more: whether there is more than is looked at.
        revision: how often a look found something else than the one before.
    """

    def __init__(self, root: Path) -> None:
        """`root` may itself be a run, or a link to a folder."""
        self.root = root.resolve()
        self.entries: dict[str, Run | Table] = {}
        self.more = False
        self.revision = 0
        self._known: _Known = {}
        self._listings: dict[str, Listing] = {}

    def look(self, whole: bool = True) -> None:
        """Look at the whole folder again.

        Args:
            whole: False: at the times of the folders, and at the files of runs that are not
                finished. That misses a file that is written over in its place, which Letheon
                itself does with the log of a run alone.
        """
        known, entries, more, listings = self._look(listings={} if whole else self._listings)
        self.revision += (entries, more) != (self.entries, self.more)
        self._known, self.entries, self.more, self._listings = known, entries, more, listings

    def find(self, path: str) -> Run | Table | None:
        """Look again at one folder alone, and return what it is; None where it is no run or table.

        Only the folders on the way are listed, and only its own files are read.
        """
        known, found, *_ = self._look(path)
        self._known |= known
        return found.get(path)

    def _look(
        self, only: str | None = None, listings: Mapping[str, Listing] | None = None
    ) -> tuple[_Known, dict[str, Run | Table], bool, dict[str, Listing]]:
        """Return what is read once, what was found, whether there is more, and the listings."""
        known: _Known = {}
        found: dict[str, Run | Table] = {}
        holders: dict[str, str] = {}
        seen: dict[str, Listing] = {}
        count = 0
        for path, folder, of, same in walk(open_folder(self.root), listings, only):
            seen[path] = of
            count += of.count
            if count > walking.MOST:
                break
            if only in (None, path) and (TABLE in of.files or RECORDS & of.files):
                known[path] = self._entry(path, folder, of, same)
                found[path] = known[path][1]
            for name in of.links:
                found[join(path, name)] = Run("not read", "a link; serve what it leads to")
            for name, new in of.locks.items():
                if only in (None, join(path, name), join(path, new)) and (
                    holder := lock_holder(name, folder)
                ):
                    holders[join(path, new)] = holder
        for path, holder in holders.items():
            entry = found.get(path, Run(""))
            if (rows := seen.get(f"{path}{ROWS}")) is not None:
                holder += f", {rows.rows} rows are finished"
            if isinstance(entry, Table):
                found[path] = replace(entry, note=holder)
            else:
                found[path] = replace(entry, state="running", note=holder)
        return known, found, count > walking.MOST, seen

    def _entry(self, path: str, folder: int, of: Listing, same: bool) -> tuple[Any, Run | Table]:
        """Return the stamp of a folder's files and what they say; read where they have changed."""
        old = self._known.get(path)
        if old and same and (isinstance(old[1], Table) or old[1].state == "finished"):
            return old
        stamp = _stamp(folder, of.files)
        if old and old[0] == stamp:
            return old
        return stamp, read_table(folder) if TABLE in of.files else read_run(folder)


def _stamp(folder: int, names: Collection[str] = FILES) -> Any:
    """Tell name, number, size and time of each file of a folder: differs when one of them does."""
    stamp = []
    for name in FILES:
        if name not in names:
            continue
        with suppress(OSError):
            of = os.stat(name, dir_fd=folder, follow_symlinks=False)
            stamp.append((name, of.st_ino, of.st_size, of.st_mtime_ns))
    return tuple(stamp)


def _read(name: str, folder: int) -> dict[str, Any]:
    """Read a JSON file of a folder; empty where there is none.

    Raises:
        InputError: a link, no regular file, too large, or damaged.
    """
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return {}
    return read_sealed(Path(name), _LARGEST, folder)


def _last_change(stamp: Any) -> float:
    return max((of[-1] for of in stamp), default=0) / 1e9


def read_run(folder: int) -> Run:
    """Read what a run says of itself; whatever is damaged becomes its state."""
    last_change = _last_change(_stamp(folder))
    try:
        with expect_shape(Path(SETTINGS)):
            return replace(_parse_run(folder), last_change=last_change)
    except (OSError, InputError) as error:
        return Run("damaged", as_text(error), last_change=last_change)


def _parse_run(folder: int) -> Run:
    end, failed, settings, request, versions = (
        _read(name, folder) for name in (FINISHED, FAILED, SETTINGS, REQUEST, VERSIONS)
    )
    method = settings.get("method") or {}
    recipe = method.get("recipe") or (method.get("inner") or {}).get("recipe") or {}
    nodes = versions.get("nodes") or []
    facts = {
        "Method": end.get("method") or method.get("name"),
        "Forgets": request.get("text") or settings.get("forget"),
        "Data": settings.get("data"),
        "Network": end.get("model") or settings.get("model"),
        "Seed": settings.get("seed"),
        "Host": ", ".join(dict.fromkeys(as_text(node.get("host")) for node in nodes)),
        "Processes": versions.get("world"),
        "Device": versions.get("device"),
        "Letheon": (versions.get("packages") or {}).get("letheon"),
    }
    reports = list(parse_lines(_read_log(folder)))
    passes = [line for line in reports if line["kind"] == "phase"]
    losses: dict[str, list[float]] = {}
    for line in passes:
        if (loss := as_number(line.get("loss"))) is not None:
            losses.setdefault(as_text(line.get("phase")), []).append(loss)
    return Run(
        "finished" if end else "failed" if failed else "unfinished",
        as_text("" if end else failed.get("message")),
        {name: as_text(value) for name, value in facts.items() if value not in (None, "")},
        as_number(recipe.get("epochs")),
        losses,
        passes[-1] if passes else {},
        reports[-_LINES:],
        as_text(end.get("weights")),
    )


def _read_log(folder: int) -> bytes:
    """Read the end of a run's log; its first line may be a part of one, which is no report."""
    try:
        with open_regular(LOG, folder) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(size - _LOG_END, 0))
            return file.read(_LOG_END)
    except FileNotFoundError:
        return b""


def read_table(folder: int) -> Table:
    """Read the rows of an evaluation, and what its page holds beside them."""
    stamp = _stamp(folder)
    last_change = _last_change(stamp)
    try:
        table, page = _read(TABLE, folder), _read(PAGE, folder)
        with expect_shape(Path(TABLE)):
            if (count := len(table["rows"])) > _ROWS:
                raise InputError(
                    f"got {count} rows; expected at most {_ROWS}; evaluate fewer models"
                )
            rows = [dict(row) for row in table["rows"]]
            if (count := len({key for row in rows for key in row})) > _COLUMNS:
                raise InputError(f"got {count} columns; expected at most {_COLUMNS}; measure fewer")
            left_out = {as_text(k): as_text(v) for k, v in table.get("left_out", {}).items()}
            reference = _parse_reference(table.get("reference"))
        return Table(rows, left_out, reference, page, "", last_change, stamp)
    except (OSError, InputError) as error:
        return Table(note=as_text(error), last_change=last_change)


def _parse_reference(content: Mapping[str, Any] | None) -> Reference | None:
    """Read the bands of the retrained models; None where the table has none."""
    if not content:
        return None
    bands = {}
    for key, of in content["bands"].items():
        std, low, high = (as_number(of[name]) for name in ("std", "low", "high"))
        bands[key] = Band(_number(of["mean"]), std, low, high, int(_number(of["seeds"])))
    return Reference(bands, int(_number(content["seeds"])))


def _number(value: Any) -> float:
    """Return a finite number of a file; anything else is not as it was written."""
    found = as_number(value)
    if found is None:
        raise TypeError(f"{as_text(value)} is no number")
    return found


def as_text(value: Any) -> str:
    """Write a value of a file as a short text."""
    text = "" if value is None else str(value)
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"


def as_number(value: Any) -> float | None:
    """Return a finite number of a file; None of anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e300 else None
