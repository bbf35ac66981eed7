"""Questions to the ranks' store that end, whether or not the process that holds it answers.

A client of torch's store waits for an answer without an end. Where the process that holds the store
stands still, the thread that asks hangs, and nothing but the end of its process stops it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_hanging: list[threading.Thread] = []


def ask(work: Callable[[], T], seconds: float) -> T:
    """Do work that asks the store, in a thread, and return its result; raises as it does.

    Raises:
        TimeoutError: there is no answer in so many seconds, or was none to an earlier question.
    """
    if hangs():
        raise TimeoutError("the ranks' store does not answer")
    results: list[T] = []
    problems: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if problems:
        raise problems[0]
    if not results:
        abandon(thread)
        raise TimeoutError("the ranks' store does not answer")
    return results[0]


def abandon(thread: threading.Thread) -> None:
    """Wait no longer for a thread that asks the store."""
    _hanging.append(thread)


def hangs() -> bool:
    """Whether a thread of this process hangs in the store: it can then only be ended at once."""
    return any(thread.is_alive() for thread in _hanging)


def holder() -> str:
    """Name the process that holds the store, by what the launcher said in the environment."""
    host = os.environ.get("MASTER_ADDR", "")
    host = socket.gethostname() if host in ("", "localhost", "127.0.0.1", "::1") else host
    who = "the launcher" if is_agents() else "rank 0"
    return f"{who} on {host}, which holds the ranks' store"


def is_agents() -> bool:
    """Whether torchrun holds the store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
