"""The watch over a rank: where it is, said once in a while; who is waited for; its stack.

Each rank of a job has a thread that leaves its place (host, step, phase) in the ranks' store and
looks whether another has run into its timeout. If so, every rank that can writes the stacks of its
threads to `stacks` in the run folder, and the one that waited names those that are behind. A second
thread ends the process where the store itself does not answer any more, and says so.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

from letheon import durable
from letheon.engine.ranks.store import abandon, ask, hangs, holder, is_agents
from letheon.errors import RunFailed

STACKS = "stacks"
"""Folder in the run folder: rank-0.txt, ... , the stacks of a job that hung."""
_BEAT = 1.0  # seconds from one word of a rank to the next
# Seconds that a signal may wait for the main thread before the process ends: just under the 25 that
# launchers give (docs/cluster.md), since one long call in the library may still end, and be saved.
_PATIENCE = 22.0
_ANSWER = 4.0  # seconds that the other ranks have to write their stacks
_EXIT = 75  # as `STOPPED`: to be started again
_FAILED = 3  # as the scripts' exit code of a run that failed
_LATE = 10.0  # seconds after the timeout until the second thread ends what the first could not


@dataclass
class Place:
    """Where this process is; the loop sets it."""

    steps: int = 0
    """Steps that this rank has started."""
    phase: str = "start"
    folder: Path | None = None
    """The run folder, once there is one; what makes a table or a mask has none."""

    def start_step(self, phase: str) -> None:
        """Count a step whose batch has arrived."""
        self.steps += 1
        self.phase = phase


PLACE = Place()


class Watch:
    """The threads of one rank, and what they have to say."""

    def __init__(self, store: Store, rank: int, world: int, timeout: float) -> None:
        """Watch over this rank through a connection of its own to the ranks' store.

        Where that gives no answer for `timeout` seconds the process ends.
        """
        self.rank, self.world, self._timeout = rank, world, timeout
        self._waiting = store.clone()  # of the main thread, which asks after a timeout
        self._beating = store.clone()
        self._number, self._answers = 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()
        self._guard = threading.Thread(target=self._end_when_silent, name="guard", daemon=True)
        self._guard.start()

    def close(self) -> None:
        """End the threads: one still in the store when Python ends would abort the process."""
        self._over.set()
        self._guard.join()
        self._thread.join(0.0 if hangs() else 30 * _BEAT)
        if self._thread.is_alive():
            abandon(self._thread)

    def _work(self) -> None:
        written = False
        with suppress(Exception):  # the store has gone with its host
            while not self._over.wait(_BEAT if self._number else 0):
                self._number += 1
                self._beating.set(f"watch/place/{self.rank}", self._word())
                asked = self._beating.check(["watch/stacks"])
                self._answers += 1
                if asked and not written:
                    written = True
                    write_stacks(self.rank, _stacks())
                    self._beating.set(f"watch/written/{self.rank}", "")

    def _end_when_silent(self) -> None:
        """End the process once the store has been silent for too long; it hangs, or soon will."""
        waited, before, heard = 0.0, time.monotonic(), self._answers
        while not self._over.wait(_BEAT):
            now = time.monotonic()
            waited += min(now - before, 2 * _BEAT)  # not the time in which this process stood still
            before = now
            if self._answers != heard or not self._thread.is_alive():
                waited, heard = 0.0, self._answers
            elif waited > self._timeout + _LATE:
                with suppress(Exception):  # a full disk must not keep the process
                    write_stacks(self.rank, _stacks())
                line = describe_silence(f"waited for {self._silent_holder()}")
                place = f"on {socket.gethostname()} (rank {self.rank})"
                print(f"error: {place}: {line}", file=sys.stderr, flush=True)
                os._exit(_FAILED)

    def _silent_holder(self) -> str:
        step = f"this rank: step {PLACE.steps}, {PLACE.phase}"
        return f"{holder()} and says nothing any more ({step})"

    def _word(self) -> str:
        word = {"host": socket.gethostname(), "steps": PLACE.steps, "phase": PLACE.phase}
        return json.dumps({**word, "number": self._number})

    def explain(self, stack: str) -> str:
        """Say who is behind after this rank's wait has timed out, and have all write their stacks.

        Args:
            stack: this rank's own, of the error.

        Returns:
            A clause that names ranks and hosts.
        """

        def look() -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
            before = self._places()
            self._waiting.set("watch/stacks", "")
            others = [f"watch/written/{r}" for r in range(self.world) if r != self.rank]
            end = time.monotonic() + _ANSWER
            while time.monotonic() < end and not self._waiting.check(others):
                time.sleep(0.1)
            return before, self._places()

        try:
            before, after = ask(look, 2 * _ANSWER)
        except Exception:  # the store has gone, or stands still, with its process
            return f"waited for {self._silent_holder()}"
        finally:
            write_stacks(self.rank, stack)
        return name_ranks(before, after, self.rank)

    def explain_loss(self, stack: str, hurry: Callable[[], object]) -> str:
        """Name what has gone after a connection was closed: the store, or ranks that say no more.

        Args:
            stack: this rank's own, of the error.
            hurry: whether a signal has come, after which mpirun kills within a second.

        Returns:
            A clause that names ranks and hosts; nothing where all are there.
        """
        try:
            lost = ask(lambda: self._find_lost(hurry), 2 * _ANSWER)
        except Exception:
            write_stacks(self.rank, stack)
            return f"lost {holder()} and has ended, or cannot be reached"
        if not lost:
            return "another rank has closed its connection" if hurry() else ""
        named = [f"rank {r} on {place['host']}" for r, place in lost.items()]
        named = named[:4] + ([f"{len(named) - 4} more"] if len(named) > 4 else [])
        place = next(iter(lost.values()))
        where = f"step {place['steps']}, {place['phase']}; this rank: step {PLACE.steps}"
        have = "which has" if len(lost) == 1 else "which have"
        return f"lost {', '.join(named)}, {have} ended, or cannot be reached ({where})"

    def stay(self, hurry: Callable[[], object]) -> None:
        """Be there, with the store where this rank holds it, while another asks who is lost."""
        end = time.monotonic() + _ANSWER + _BEAT
        while time.monotonic() < end and (is_agents() or not hurry()):
            time.sleep(_BEAT / 4)

    def _find_lost(self, hurry: Callable[[], object]) -> dict[int, dict[str, Any]]:
        """The other ranks that have said nothing for some seconds."""
        before = after = self._places()
        lost = [rank for rank in before if rank != self.rank]
        end = time.monotonic() + _ANSWER
        while lost and time.monotonic() < end:
            if hurry() and not is_agents():  # torchrun has patience
                return {}
            time.sleep(_BEAT / 4)
            after = self._places()
            lost = [rank for rank in lost if after[rank]["number"] == before[rank]["number"]]
        return {rank: after[rank] for rank in lost}

    def _places(self) -> dict[int, dict[str, Any]]:
        places = {}
        for rank in range(self.world):
            key = f"watch/place/{rank}"
            if self._waiting.check([key]):
                places[rank] = json.loads(self._waiting.get(key))
        return places


def name_ranks(
    before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], own: int
) -> str:
    """Name the ranks that are waited for, from what all have said at two moments.

    Silent ones first (the process or its host stands still), else those that have started fewer
    steps.
    """
    silent = [r for r in after if r != own and after[r]["number"] == before[r]["number"]]
    most = max(place["steps"] for place in after.values())
    behind = silent or [r for r in after if after[r]["steps"] < most]
    if not behind:
        return f"all are in {after[own]['phase']}, at step {most}; their stacks say more"
    named = [f"rank {r} on {after[r]['host']}" for r in behind[:4]]
    if len(behind) > 4:
        named.append(f"{len(behind) - 4} more")
    state = "which says nothing any more" if silent else "which is behind"
    first = after[behind[0]]
    return (
        f"waited for {', '.join(named)}, {state} (step {first['steps']}, {first['phase']}; this "
        f"rank: step {after[own]['steps']})"
    )


def describe_silence(who: str) -> str:
    """What a rank says that has waited in vain for those that `who` names."""
    where = "on their standard error" if PLACE.folder is None else "in the run folder"
    return (
        f"got no answer within the timeout: {who}; stacks of the ranks that live are {where}; "
        "mend that host, or raise the timeout"
    )


def write_stacks(rank: int, text: str) -> None:
    """Write a rank's stacks to the run folder; to standard error where it is not on this host."""
    folder = PLACE.folder
    if folder is None or not folder.is_dir():
        print(f"rank {rank}:\n{text}", file=sys.stderr, flush=True)
        return
    with suppress(RunFailed, OSError):  # a disk that went away is no second error
        (folder / STACKS).mkdir(exist_ok=True)
        durable.write(folder / STACKS / f"rank-{rank}.txt", f"{socket.gethostname()}\n{text}")


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


@contextmanager
def end_when_deaf() -> Iterator[None]:
    """Within, a signal that the main thread does not hear for some seconds ends the process.

    A thread that waits in the library for a rank that has died runs no handler; without this it
    holds up its launcher until that kills it. For the main thread; elsewhere it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    heard = threading.Event()
    ours = [n for n in (signal.SIGTERM, signal.SIGINT) if callable(signal.getsignal(n))]
    handlers = {number: signal.getsignal(number) for number in ours}

    def hear(number: int, frame: Any) -> None:
        heard.set()
        handler = handlers[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    def wait() -> None:
        while select.select([reading], [], [])[0]:
            number = os.read(reading, 1)
            if not number or number == b"\0":
                break
            if number[0] in ours and not heard.wait(_PATIENCE):
                os._exit(_EXIT)
        os.close(reading)

    for number in ours:
        signal.signal(number, hear)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=wait, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(writing, b"\0")
        thread.join(1)
        os.close(writing)
