"""Where the wall clock of a process went: exclusive spans that add up to all of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
FIRST = "start-up"
PARTS = (FIRST, "data", "compute", "statistics", "evaluation", "validation", "saving")
"""What the end-to-end benchmark books its time to."""
SPAWNED, RESULT = "SPANS_SPAWNED", "SPANS_RESULT"


class Spans:
    """Seconds by name. An inner span's time is not its outer span's; what is in none is start-up.

    The clock starts when the parent process spawned this one, where it says so (`SPAWNED`, in
    seconds since the epoch), so imports are in start-up too. Of the first thread only.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = [FIRST]
        self._closed_to_others = 0
        waited = time.time() - float(os.environ.get(SPAWNED, time.time()))
        self._since = time.perf_counter() - waited

    def _book(self) -> None:
        now = time.perf_counter()
        name = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def __call__(self, name: str, whole: bool = False) -> Iterator[None]:
        """Book the time inside to `name`; with `whole`, that of spans within it too."""
        self._book()
        self._open.append(self._open[-1] if self._closed_to_others else name)
        self._closed_to_others += whole
        try:
            yield
        finally:
            self._book()
            self._open.pop()
            self._closed_to_others -= whole

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """The function, its time booked to `name`."""

        def call(*args: Any, **kwargs: Any) -> T:
            with self(name):
                return function(*args, **kwargs)

        return call

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; what passes until each has come is booked to `name`."""
        with self(name):
            source = iter(items)
        while True:
            with self(name):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def write(self) -> None:
        """Leave the seconds as JSON where the parent process looks for them."""
        self._book()
        if os.environ.get(RESULT) and os.environ.get("RANK", "0") == "0":
            Path(os.environ[RESULT]).write_text(json.dumps(self.seconds) + "\n")
