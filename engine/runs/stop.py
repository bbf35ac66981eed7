"""Signals that ask a run to stop, and the agreement of the ranks on the step after which they do.

SIGTERM, SIGINT and SIGUSR1 (schedulers' warning) mean: save, say so in a line, and exit with
`STOPPED`. Outside training nothing is lost, and the process ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_objects

STOPPED = 75
"""Exit code of a run that a signal stopped (EX_TEMPFAIL): the same command goes on with it."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_BETWEEN_POLLS = 0.5
"""About so often the ranks ask each other; in steps, by the first rank's clock."""
GO_ON, SAVE, STOP = 0, 1, 2

_Handler = Callable[[int, FrameType | None], Any] | int | None  # as signal.getsignal returns


class Stopped(BaseException):
    """A signal ended the process; what there was to save is saved. Not an error."""


class _Listener:
    """What the signals of this process have said."""

    def __init__(self) -> None:
        self.signal: str = ""  # the first that came
        self.deferred = False  # within training, which asks by itself
        self.stopped = False  # the process is ending already
        self.second: _Handler = signal.SIG_DFL  # of a further Ctrl-C

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal, or end the process where nothing needs saving."""
        self.signal = self.signal or signal.Signals(number).name
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, self.second)
        if not self.deferred and not self.stopped:
            stop("before there was anything to save")


_listener = _Listener()


@contextmanager
def listen(second: _Handler = signal.SIG_DFL) -> Iterator[None]:
    """Take the signals within; for the main thread of a process.

    `second` handles a second Ctrl-C; by default that ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener.signal, _listener.deferred, _listener.stopped = "", False, False
    _listener.second = second
    before = {number: signal.signal(number, _listener.hear) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_signal() -> str:
    """Name the signal that has asked this process to stop; empty where none has."""
    return _listener.signal


def defer(on: bool) -> None:
    """Let signals wait until `Poll.after_step` asks for them, or no longer."""
    _listener.deferred = on


def signals_wait() -> bool:
    """Whether signals wait now."""
    return _listener.deferred


def stop(place: str) -> NoReturn:
    """Raise `Stopped`; further signals are then ignored, so that they disturb no cleaning up."""
    _listener.stopped = True
    raise Stopped(place)


def check(ranks: Ranks) -> None:
    """Between two parts of a job: stop where a signal came that nobody asked for any more.

    Every rank must call.

    Raises:
        Stopped: on every rank.
    """
    if any(gather_objects(_listener.signal, ranks)):
        stop("between two parts of the job; what is finished is saved")


class Poll:
    """After which step every rank saves or stops, without any waiting for another.

    The ranks' wishes go round in a sum that is begun after one step and read after the next.
    """

    def __init__(self, ranks: Ranks, seconds: float = 0.0, steps: int = 0) -> None:
        """Save after so many seconds of the first rank's clock or so many steps; 0: never."""
        self.ranks, self._seconds, self._every = ranks, seconds, steps
        self._steps = 0
        self.reset()
        self._started = self._looked = time.monotonic()
        self._next = 1  # step after which the ranks ask each other
        self._sent: tuple[Any, Tensor] | None = None

    def reset(self) -> None:
        """Count from now on, after a save."""
        self._saved, self._saved_steps = time.monotonic(), self._steps

    def after_step(self, broken: Callable[[], bool] = lambda: False) -> int:
        """Say what is due: GO_ON, SAVE or STOP; the same on every rank after the same step.

        Args:
            broken: whether something is amiss on this rank for which a save would be refused; it
                must not wait. The save is then due at once.
        """
        self._steps += 1
        by_steps = bool(self._every) and self._steps - self._saved_steps >= self._every
        wish = self._wish(broken) if self.ranks.world == 1 else self._exchange(broken)
        return max(wish, SAVE if by_steps else GO_ON)

    def after_epoch(self) -> int:
        """The same at the end of an epoch, where a tenth of the seconds is enough; it may wait."""
        return max(gather_objects(self._wish(share=0.1), self.ranks))

    def _wish(self, broken: Callable[[], bool] = lambda: False, share: float = 1.0) -> int:
        if _listener.signal:
            return STOP
        now = time.monotonic()
        if now - self._looked >= SECONDS_BETWEEN_POLLS:
            self._looked = now
            if broken():
                return SAVE
        late = now - self._saved >= share * self._seconds
        return SAVE if self._seconds and late and self.ranks.main else GO_ON

    def _exchange(self, broken: Callable[[], bool]) -> int:
        if self._sent is not None:
            work, answer = self._sent
            work.wait()
            self._sent = None
            wish, interval = answer.tolist()
            self._next = self._steps + interval
            return int(wish)
        if self._steps >= self._next:
            interval = 0
            if self.ranks.main:
                pace = (time.monotonic() - self._started) / self._steps
                interval = max(1, min(64, int(SECONDS_BETWEEN_POLLS / max(pace, 1e-6))))
            wishes = torch.tensor([self._wish(broken), interval], dtype=torch.int64)
            work = dist.all_reduce(wishes, dist.ReduceOp.MAX, async_op=True)
            self._sent = (work, wishes)
        return GO_ON
