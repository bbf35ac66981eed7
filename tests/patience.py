"""How long tests wait: the one limit, and the one loop.

No test measures how busy the machine is. What a test waits for comes within seconds on an idle
machine, at most within four minutes, and only a hang is as late as this; all waits share it. What
takes long is looked at long before: `showing_stacks` writes where it is, and ends nothing.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PATIENCE = 3600
"""Seconds of any wait, for a pipe, a process or a condition, after which it counts as hung."""
SILENCE = 120
"""`--timeout` of jobs in which a rank is stopped on purpose: that long each of these tests waits.

A rank that lives computes a step of such a job in milliseconds. Jobs that lose no rank, or one
whose connections close, have `PATIENCE`.
"""

LOOK = 300.0
"""Seconds after which, again and again, a test that is not over has the stacks of its process and
ranks written to standard error. It judges nothing: a slow machine only sees more of them."""
STDERR = "LETHEON_TEST_STDERR"
"""Environment variable: the file that standard error was before pytest took it, for processes of
the tests, too."""


@contextmanager
def showing_stacks(every: float = LOOK) -> Iterator[None]:
    """Within, write the stacks of all threads of this process every so many seconds."""
    place = -1
    with suppress(KeyError, OSError):  # such as a socket, which cannot be opened by its name
        place = os.open(os.environ[STDERR], os.O_WRONLY | os.O_APPEND)
        faulthandler.dump_traceback_later(every, repeat=True, file=place)
    try:
        yield
    finally:
        if place >= 0:
            faulthandler.cancel_dump_traceback_later()
            os.close(place)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until a condition holds; fails with `what` after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"no {what} in {PATIENCE} s"
        time.sleep(0.1)
