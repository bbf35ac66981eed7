"""Where the numbers of a run go while it runs: one small interface, one class a destination."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from letheon import durable

PREVIOUS = "previous"
"""Key of a line's link to the line before: its SHA-256 in hex, empty in the first line."""


class Logger(Protocol):
    """Takes what the loop reports, on the first rank; it must not wait for the device."""

    def log(self, line: Mapping[str, Any]) -> None:
        """One report: its ``kind``, seconds since the start as ``at``, and numbers by name."""
        ...


class JsonLines:
    """Append each report to a file as one line of JSON, at once; each holds the last one's digest.

    A line that the disk refuses is counted and left out, and takes no run down.

    Attributes:
        missing: lines that could not be written.
        reason: of the first of these.
    """

    def __init__(self, path: Path):
        """Go on with the file at `path`, if there is one."""
        self.path = path
        self.missing, self.reason = 0, ""
        self._read()

    def _read(self) -> None:
        text = self.path.read_bytes() if self.path.exists() else b""
        self._size = len(text)
        self._last = text.splitlines()[-1] if text else b""

    def log(self, line: Mapping[str, Any]) -> None:
        """Append; a machine that stops loses at most the line being written."""
        if self.path.exists() and self.path.stat().st_size < self._size:
            self._read()  # it was cut, for a run that goes on from an earlier state
        link = hashlib.sha256(self._last).hexdigest() if self._last else ""
        text = json.dumps({**line, PREVIOUS: link}, default=str).encode()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(handle, self._size)  # half a line of an earlier failure
                if os.pwrite(handle, text + b"\n", self._size) <= len(text):
                    raise OSError(0, "only half a line fitted")
            finally:
                os.close(handle)
        except OSError as error:
            self.missing += 1
            self.reason = self.reason or str(error.strerror or error)
        else:
            self._last = text
            self._size += len(text) + 1

    def flush(self) -> None:
        """Push the lines to the disk, at the end of a run."""
        try:
            durable.flush(self.path)
        except OSError as error:
            self.reason = self.reason or str(error.strerror or error)


def broken_link(path: Path) -> int | None:
    """Find the first line of a log, counted from one, that does not hold the digest of the last.

    None where the chain is whole; lines of old logs, which have no link, are not checked.
    """
    link = ""
    if not path.exists():
        return None
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            return number
        if not isinstance(line, dict) or line.get(PREVIOUS, link) != link:
            return number
        link = hashlib.sha256(text).hexdigest()
    return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the reports of a log, those that are damaged or have no kind left out."""
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "kind" in line:
            yield line
