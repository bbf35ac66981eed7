"""Progress on standard error: one live line on a terminal; where it is piped, a line an epoch.

Where an epoch takes long, a line every two minutes says how far it is.

The command line chooses the mode (`choose_mode`); a caller from Python gets the live line where
standard error is a terminal, and silence elsewhere. Nothing here waits for a device.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

T = TypeVar("T")
Mode = Literal["live", "lines", "silent"]

_REFRESH = 0.1  # seconds between two states of the live line
_SILENCE = 120.0  # seconds without a line where standard error is no terminal
_NAME = 40  # characters of a name on a live line, so that what follows is seen
_SETTLED = 5.0  # seconds of some work before a line about it has a rate

_mode: Mode | None = None
_shown_at = 0.0
_line_at = time.perf_counter()
_visible = False


def choose_mode(quiet: bool) -> None:
    """Choose what a command shows: nothing, the live line of a terminal, or lines."""
    global _mode
    _mode = "silent" if quiet else "live" if _is_terminal() else "lines"


def mode() -> Mode:
    """Return the mode in force."""
    return _mode or ("live" if _is_terminal() else "silent")


def _is_terminal() -> bool:
    """Whether standard error can go back to the start of its line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str) -> None:
    """Print a line on standard error; a live line makes room for it."""
    global _line_at
    clear()
    _line_at = time.perf_counter()
    print(text, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a line about how the work is done; a quiet command leaves it out."""
    if _mode != "silent":
        say(text)


def clear() -> None:
    """Remove the live line, where one is on the screen."""
    global _visible
    if _visible:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
    _visible = False


def _columns() -> int:
    """Characters that a live line may have."""
    return max(shutil.get_terminal_size().columns - 1, 10)


def _draw(text: str) -> None:
    global _shown_at, _visible
    sys.stderr.write(f"\r{text[: _columns()]}\x1b[K")
    sys.stderr.flush()
    _shown_at, _visible = time.perf_counter(), True


def show(text: str) -> None:
    """Show what is being done on the live line of a terminal; elsewhere nothing."""
    if mode() == "live":
        _draw(text)


class Line:
    """Work of a known length while it is done: how far, how fast, and how long it waits for data.

    Attributes:
        done: of `total`, in batches, images or whatever is counted.
        images: read so far.
        waited: seconds until the next item was there.
    """

    def __init__(
        self,
        label: str,
        total: int,
        speaks: bool = True,
        facts: Callable[[], Sequence[str]] = tuple,
        left: Callable[[float], float] | None = None,
    ) -> None:
        """Begin the clock.

        Args:
            label: what is done, such as "epoch 3/30 train".
            total: how much there is to do.
            speaks: False on all ranks but the first.
            facts: what else the line shows, such as the loss; asked when the line is drawn.
            left: seconds left of the whole job, given the share of this line that is done; by
                default those of this line.
        """
        self.label, self.total, self.facts, self._left = label, total, facts, left
        self.mode: Mode = mode() if speaks else "silent"
        self.done = self.images = self._skipped = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def watch(self, items: Iterable[T], images: Callable[[T], int]) -> Iterator[T]:
        """Yield the items, and show after each how far they are; `images(item)` counts its own."""
        if self.mode == "silent":
            yield from items
            return
        for item in self.wait_for(items):
            yield item
            self.advance(1, images(item))

    def wait_for(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time until each is there counts as waiting for data."""
        source = iter(items)
        while True:
            asking = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asking
            yield item

    def skip(self, done: int) -> None:
        """Count what was done before the clock began: it took none of the time."""
        self.done += done
        self._skipped += done

    def advance(self, done: int, images: int) -> None:
        """Count what was done; on a terminal, show it, and elsewhere after a long silence."""
        self.done += done
        self.images += images
        now = time.perf_counter()
        live = now - _shown_at > _REFRESH
        late = now - _line_at > _SILENCE and now - self.started > _SETTLED
        if (self.mode == "live" and live) or (self.mode == "lines" and late):
            words = [self.label, f"{self.done}/{self.total}", *self.speed()]
            left = f"left {format_seconds(self._seconds_left())}"
            while self.mode == "live" and len("  ".join([*words, left])) > _columns() and words[2:]:
                words.pop()  # memory first: the time left is what a narrow terminal keeps
            (_draw if self.mode == "live" else say)("  ".join([*words, left]))

    def _seconds_left(self) -> float:
        share = self.done / self.total if self.total else 1.0
        if self._left is not None:
            return self._left(share)
        spent, done = time.perf_counter() - self.started, self.done - self._skipped
        return spent / done * (self.total - self.done) if done else 0.0

    def speed(self) -> list[str]:
        """Write the facts, images a second, share of time spent waiting for data, and memory."""
        spent = max(time.perf_counter() - self.started, 1e-9)
        return [
            *self.facts(),
            f"{self.images / spent:,.0f} images/s",
            f"data {min(self.waited / spent, 1.0):.0%}",
            f"memory {_memory() / 2**30:.1f} GiB",
        ]

    def close(self) -> None:
        """Leave one line about it where the output is piped."""
        if self.mode == "lines":
            spent = format_seconds(time.perf_counter() - self.started)
            say("  ".join([self.label, *self.speed(), f"took {spent}"]))
        clear()


class Items:
    """Work on one item after another, each in named pieces: the metrics of a model, then the next.

    A terminal has one live line, with the piece in hand and the time left of all items; elsewhere
    each item leaves one line once it is done.

    Attributes:
        done: items so far.
    """

    def __init__(self, verb: str, total: int, speaks: bool = True, whose: str = "") -> None:
        """Begin the clock.

        Args:
            verb: what is done to an item, such as "measure".
            total: how many items there are.
            speaks: False on all ranks but the first.
            whose: stands behind their number where they are not all, such as " of this rank's".
        """
        self.verb, self.total, self._whose = verb, total, whose
        self.mode: Mode = mode() if speaks else "silent"
        self.done = 0
        self._name, self._piece = "", 0
        self._started = self._item_started = time.perf_counter()

    def start(self, name: str) -> None:
        """Begin an item."""
        self._name, self._piece = name, 0
        self._item_started = time.perf_counter()

    def show(self, piece: str, pieces: int) -> None:
        """Show the piece, one of `pieces`, that is now begun; elsewhere after a long silence."""
        now = time.perf_counter()
        spent = now - self._started
        share = (self.done + self._piece / pieces) / max(self.total, 1)
        self._piece += 1
        late = now - _line_at > _SILENCE and spent > _SETTLED
        if self.mode == "live" or (self.mode == "lines" and late):
            words = [self._label(shorten(self._name)), f"{piece} {self._piece}/{pieces}"]
            words += [f"left {format_seconds(spent / share * (1 - share))}"] if share else []
            (_draw if self.mode == "live" else say)("  ".join(words))

    def finish(self) -> None:
        """End the item; where the output is piped, leave a line about it."""
        if self.mode == "lines":
            spent = format_seconds(time.perf_counter() - self._item_started)
            memory = f"memory {_memory() / 2**30:.1f} GiB"
            say("  ".join([self._label(self._name), memory, f"took {spent}"]))
        self.done += 1

    def _label(self, name: str) -> str:
        """What is done to which item."""
        return f"{self.verb} {name}  {self.done + 1}/{self.total}{self._whose}"


def shorten(name: str) -> str:
    """Return the name as a live line shows it: of a long one the end, where names differ."""
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _memory() -> int:
    """Bytes in use: allocated on the GPU where one is used, else this process's peak."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def format_seconds(seconds: float) -> str:
    """Write a duration: 4.2 s, 3:07 (minutes) or 2:05:09 (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
