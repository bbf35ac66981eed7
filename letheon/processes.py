"""Helper processes: they end with their parent, however that ends, and leave Ctrl-C to it."""

from __future__ import annotations

import ctypes
import errno
import io
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

_SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
PARENT = "LETHEON_PARENT"
"""Variable with the number of the process that a command is to end with."""
_LINGER = 20  # seconds that a helper outlives a scheduler's SIGTERM
_LOOK = 1.0  # seconds between two looks for the parent, where no signal tells of its death


def reuse_freed_memory() -> None:
    """Let this process keep the memory of tensors up to 1 GiB that are freed, for the next ones.

    glibc gives each tensor above 32 MiB back to the system, and the next step's pays for its pages
    again. Nothing is set where the environment already says how memory is allocated, or where
    there is no glibc.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with suppress(AttributeError, OSError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_THRESHOLD, 2**30)
        set_option(_TRIM_THRESHOLD, 2**31 - 1)


def follow_parent(by_signal: bool = True) -> None:
    """Let this helper process be killed when its parent dies; call it first in the helper.

    SIGINT is ignored from here on: a terminal sends it to the whole group, and the parent handles
    it.

    Args:
        by_signal: let Linux kill it at once. Its signal also comes when the thread that started
            the helper ends, so pass false where that is not the parent's main thread; the helper
            then looks once a second, as it does on other systems.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "SLURM_JOB_ID" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        _outlive_warnings()
    parent, starter = os.getppid(), multiprocessing.parent_process()
    if by_signal and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    direct = multiprocessing.get_start_method(allow_none=True) != "forkserver"
    if starter is not None and direct and starter.pid != parent:
        os._exit(1)  # it died before it could be followed
    if not by_signal or sys.platform != "linux":
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _outlive_warnings() -> None:
    """Let a scheduler's signals, which come to every process of a job, leave this helper at work.

    Its parent saves and then ends it; a SIGTERM ends it after some seconds all the same.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LINGER))


def end_with_launcher(launched: bool) -> None:
    """Let this process end when the one that started it dies; on Linux.

    A rank that a launcher started (`launched`) has a SIGTERM when that dies, which the run saves
    itself on; a run that another command started for its own sake (`PARENT`) is killed.
    """
    if sys.platform != "linux":
        return
    if PARENT in os.environ:
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.environ.pop(PARENT) != str(os.getppid()):
            os._exit(1)  # it died before it could be followed
    elif launched:
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def in_main_thread() -> bool:
    """Whether helpers started here may follow by signal."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Start helpers inside: a Ctrl-C meets the parent afterwards, and none of the helpers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)


class _Lossy:
    """A stream whose reader may go, or whose disk may fill: lines are lost, and no run."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, if it can be written."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be flushed."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def end_with_reader() -> Iterator[None]:
    """Lose standard error where it cannot be written, and end where standard output cannot.

    Where its reader has gone, the exit code is that of SIGPIPE; where there is no room, 3; but a
    code that says more than success stays. A stream that was closed before is an empty one.
    """
    before = sys.stdout, sys.stderr
    sys.stdout = before[0] or io.StringIO()
    sys.stderr = _Lossy(before[1] or io.StringIO())
    end, problem = None, None
    try:
        try:
            yield
        except SystemExit as error:
            end = error
        except OSError as error:
            if not _is_of_output(error):
                raise
            problem = error
        problem = _flush_output() or problem
        if problem is not None and not (end and end.code):
            _end_without_output(problem)
        if end is not None:
            raise end
    finally:
        sys.stdout, sys.stderr = before


def _is_of_output(error: OSError) -> bool:
    """Whether an error without a file's name is one of standard output."""
    if isinstance(error, BrokenPipeError):
        look = select.poll()
        look.register(sys.stdout.fileno())
        return any(events & select.POLLERR for _, events in look.poll(0))
    return error.filename is None and error.errno == errno.ENOSPC


def _flush_output() -> OSError | None:
    """Flush standard output; one that cannot be flushed takes nothing more."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _end_without_output(problem: OSError) -> NoReturn:
    if isinstance(problem, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    print(
        f"error: got {problem.strerror} for standard output; expected room there; what was made "
        "before stands",
        file=sys.stderr,
    )
    sys.exit(3)
