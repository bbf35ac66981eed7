"""Where the numbers of a run go while it runs: one small interface, one class a destination."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Takes what the loop reports, on the first rank; it must not wait for the device."""

    def log(self, line: Mapping[str, Any]) -> None:
        """One report: its ``kind``, seconds since the start as ``at``, and numbers by name."""
        ...


class JsonLines:
    """Append each report to a file as one line of JSON, at once."""

    def __init__(self, path: Path):
        self.path = path

    def log(self, line: Mapping[str, Any]) -> None:
        """Append; a machine that stops loses at most the line being written."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
