"""Named spans of time: where the clock of a process went. They cost next to nothing unrecorded.

    with span("statistics"):
        ...

    @span("saving")
    def save(...): ...

    for batch in waits("data", loader):  # the time until each batch is there
        ...

    with Recorder() as recorder:
        work()
    recorder.wall  # seconds by name; an inner span's time is not its outer span's

Names in use: data, compute, statistics, evaluation, loading, saving. Threads other than the
recorder's are not recorded: their spans pass unseen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

OUTSIDE = "start-up"
"""The name of what is in no span."""

_recorder: Recorder | None = None


class Recorder:
    """Wall and processor seconds by span name; exclusive, so that they add up to all of the time.

    One at a time in a process; while it is open, the spans of the thread that made it are booked.
    """

    def __init__(self, waited: float = 0.0) -> None:
        """`waited` wall seconds before now count as outside, such as the start of a process."""
        self.wall: dict[str, float] = {OUTSIDE: waited}
        self.processor: dict[str, float] = {OUTSIDE: 0.0}
        self._open: list[tuple[str, bool]] = [(OUTSIDE, False)]
        self._thread = threading.get_ident()
        self._since = time.perf_counter(), time.process_time()

    def __enter__(self) -> Recorder:
        global _recorder
        _recorder = self
        return self

    def __exit__(self, *error: object) -> None:
        global _recorder
        self.book()
        _recorder = None

    def book(self) -> None:
        """Book the time since the last change of span to the innermost open one."""
        now = time.perf_counter(), time.process_time()
        name = self._open[-1][0]
        for seconds, old, new in zip((self.wall, self.processor), self._since, now, strict=True):
            seconds[name] = seconds.get(name, 0.0) + new - old
        self._since = now

    def enter(self, name: str, whole: bool) -> bool:
        """Open a span; False in another thread, where nothing was opened."""
        if threading.get_ident() != self._thread:
            return False
        self.book()
        outer, closed = self._open[-1]
        self._open.append((outer, True) if closed else (name, whole))
        return True

    def leave(self) -> None:
        """Close the innermost span."""
        self.book()
        self._open.pop()


class span:
    """Book the time of a block or of a function to a name.

    With `whole`, the time of spans inside it too.
    """

    def __init__(self, name: str, whole: bool = False) -> None:
        self._name, self._whole = name, whole
        self._recorder: Recorder | None = None

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function, each of its calls in a span of its own."""

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(self._name, self._whole):
                return function(*args, **kwargs)

        return call

    def __enter__(self) -> None:
        if _recorder is not None and _recorder.enter(self._name, self._whole):
            self._recorder = _recorder

    def __exit__(self, *error: object) -> None:
        if self._recorder is not None:
            self._recorder.leave()
            self._recorder = None


def waits(name: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items; the time until each is there is booked to `name`, not the time between."""
    with span(name):
        source = iter(items)
    while True:
        with span(name):
            try:
                item = next(source)
            except StopIteration:
                return
        yield item
