"""What a long benchmark has measured, in a folder that is kept: it goes on where it was cut off."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
NAME = "journal.jsonl"


class Journal:
    """Values by key, a line of JSON each, on the disk as soon as they are known.

    Attributes:
        goes_on: whether an earlier call has left values.
    """

    def __init__(self, folder: Path, facts: Mapping[str, object]) -> None:
        """Read what an earlier call left; it must have measured the same, here and by this code."""
        self._file = folder / NAME
        self._known: dict[str, object] = {}
        lines = self._file.read_text().splitlines(keepends=True) if self._file.is_file() else []
        for line in lines:
            if line.endswith("\n"):  # else cut off while it was written
                key, value = json.loads(line)
                self._known[key] = value
        found = self._known.get("facts", facts)
        if found != json.loads(json.dumps(facts)):
            sys.exit(f"got --resume {folder} of {found}; expected {facts}; name a new folder")
        self.goes_on = len(self._known) > 1
        folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(line for line in lines if line.endswith("\n")))
        if "facts" not in self._known:
            self.keep("facts", lambda: dict(facts))

    def keep(self, key: str, measure: Callable[[], T]) -> T:
        """The value of `key`: as it was measured earlier, or measured now. Any that JSON knows."""
        if key not in self._known:
            value = measure()
            with self._file.open("a") as file:
                file.write(json.dumps([key, value]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._known[key] = value
        return self._known[key]  # type: ignore[return-value]

    def __contains__(self, key: str) -> bool:
        """Whether it has been measured."""
        return key in self._known


@contextmanager
def work_folder(folder: Path | None) -> Iterator[Path]:
    """The folder, which is kept, as a whole path; without one, another that goes at the end."""
    if folder is not None:
        yield folder.resolve()  # its processes have another working directory
        return
    with tempfile.TemporaryDirectory() as other:
        yield Path(other)
