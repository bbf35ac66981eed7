"""How long tests wait: the one limit, and the one loop.

No test measures how busy the machine is. What a test waits for comes within seconds on an idle
machine, at most within four minutes, and only a hang is as late as this; all waits share it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 3600
"""Seconds of any wait, for a pipe, a process or a condition, after which it counts as hung."""
SILENCE = 120
"""`--timeout` of jobs in which a rank is stopped on purpose: that long each of these tests waits.

A rank that lives computes a step of such a job in milliseconds. Jobs that lose no rank, or one
whose connections close, have `PATIENCE`.
"""


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until a condition holds; fails with `what` after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"no {what} in {PATIENCE} s"
        time.sleep(0.1)
