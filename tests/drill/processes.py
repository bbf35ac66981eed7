"""The scripts in forked children of a process that has imported everything once, and their ends.

A child dies, fills the disk or stops at its n-th event: a file that it opens, renames, removes or
flushes below its folder, a step, or an exchange with other ranks. So no instant depends on the
machine's speed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE
from tests.ports import free_port

EXCHANGES = (
    "all_reduce", "all_gather", "all_gather_object", "all_to_all_single", "barrier", "broadcast",
    "broadcast_object_list", "recv", "scatter_object_list", "send",
)  # fmt: skip
"""Functions of torch.distributed by which ranks speak to each other."""


@dataclass(frozen=True)
class Fault:
    """What happens to a process, and at which of its events."""

    act: Callable[[], object]
    event: int
    """At the n-th event, counted from one; 0: never."""
    within: str = ""
    """Part of the path of the files that count; ``step``: steps count instead, of training or of a
    pass that saves; ``exchange``: what the ranks send each other."""


@dataclass(frozen=True)
class End:
    """How a job ended: its exit code (negative: a signal's number), and what it printed."""

    code: int
    text: str
    events: Mapping[int, int] = field(default_factory=dict)
    """Of each rank that came to its end."""
    hung: bool = False


def kill_self() -> None:
    """Die at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_launcher() -> None:
    """Let the process die that has started this rank, and this one go on."""
    os.kill(os.getppid(), signal.SIGKILL)


def stop_self() -> None:
    """Stand still, as a rank that hangs does."""
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass
class _Counter:
    """Counts this process's events, and acts at one of them."""

    folder: str
    fault: Fault
    notes: Path
    count: int = 0

    def __post_init__(self) -> None:
        self.process = os.getpid()
        self.busy = False

    def add(self) -> None:
        """One event."""
        if self.busy or os.getpid() != self.process:
            return
        self.count += 1
        if self.count == self.fault.event:
            self.busy = True
            self.fault.act()
            self.busy = False

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit event: does it touch a file below the folder?"""
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            path = args[0]
            if isinstance(path, str | os.PathLike) and self._counts(str(path)):
                self.add()

    def _counts(self, path: str) -> bool:
        return path.startswith(self.folder) and self.fault.within in path

    def _counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, each call of which is an event."""

        def call(*args: Any, **options: Any) -> Any:
            self.add()
            return work(*args, **options)

        return call

    def install(self) -> None:
        """Listen from now on."""
        if self.fault.within == "step":
            from letheon.engine.runs.stop import Poll

            before = Poll.after_step

            def after_step(poll: Poll, *broken: Callable[[], bool]) -> int:
                self.add()
                return before(poll, *broken)

            Poll.after_step = after_step  # type: ignore[method-assign]
            return
        if self.fault.within == "exchange":
            import torch.distributed as dist

            for name in EXCHANGES:
                setattr(dist, name, self._counted(getattr(dist, name)))
            return
        fsync, pwrite = os.fsync, os.pwrite

        def flush(handle: int) -> None:
            if self._counts(os.readlink(f"/proc/self/fd/{handle}")):
                self.add()
            fsync(handle)

        def append(handle: int, text: bytes, offset: int) -> int:
            if self._counts(os.readlink(f"/proc/self/fd/{handle}")):
                self.add()
            return pwrite(handle, text, offset)

        os.fsync, os.pwrite = flush, append  # type: ignore[assignment]
        sys.addaudithook(self.hear)


def _child(script: str, args: Sequence[str], log: Path, fault: Fault, folder: Path) -> None:
    """The child's whole life."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((null, 0), (handle, 1), (handle, 2)):
        os.dup2(number, target)
    from tests.drill.scripts import start_of

    counter = _Counter(str(folder.resolve()), fault, log)
    counter.install()
    sys.argv = [f"{script}.py", *args]
    code = 0
    try:
        start_of(script)()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    counter.busy = True
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"\nevents {os.environ.get('RANK', 0)} {counter.count}\n".encode())
    os._exit(code)


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a child, which ends with it."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:  # whatever happens, such as a full disk while that is printed
        os._exit(code)


def run_job(
    script: str,
    args: Sequence[str],
    folder: Path,
    faults: Mapping[int, Fault] | None = None,
    world: int = 1,
    after: float | None = None,
    agent: bool = True,
) -> End:
    """Run a script to its end, with a fault on some of its ranks, or a SIGKILL after some seconds.

    Args:
        script: its name.
        args: its command line.
        folder: where events count.
        faults: by rank.
        world: ranks; several are started, and ended, as torchrun does.
        after: seconds until the process (of one rank) is killed from outside.
        agent: whether the ranks' store is the launcher's, as torchrun's; else rank 0's, as srun's.
    """
    log = Path(tempfile.gettempdir()) / f"letheon-drill-{os.getpid()}.log"  # not on a full disk
    log.unlink(missing_ok=True)
    none = Fault(kill_self, 0)
    faults = {rank: (faults or {}).get(rank, none) for rank in range(world)}
    if world == 1:
        process = fork(lambda: (os.setsid(), _child(script, args, log, faults[0], folder)))
    else:
        process = fork(lambda: _launch(script, args, log, faults, folder, agent))
    deadline = time.monotonic() + PATIENCE
    kill_at = None if after is None else time.monotonic() + after
    status, hung = None, False
    while status is None:
        found, value = os.waitpid(process, os.WNOHANG)
        now = time.monotonic()
        if found:
            status = value
        elif kill_at is not None and now >= kill_at:
            os.kill(process, signal.SIGKILL)
            kill_at = None
        elif now >= deadline and not hung:
            hung = True
            end_session(process)
        else:
            time.sleep(0.003)
    hung |= not _session_ends(process, deadline)
    text = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    words = [line.split()[1:] for line in text.splitlines() if line.startswith("events ")]
    events = {int(rank): int(count) for rank, count in words}
    return End(os.waitstatus_to_exitcode(status), text, events, hung)


def _launch(
    script: str, args: Sequence[str], log: Path, faults: Mapping[int, Fault], folder: Path,
    agent: bool,
) -> None:  # fmt: skip
    """Start the ranks and keep their store, as torchrun does, if it is to be the launcher's.

    When one fails the others have a SIGTERM, then a SIGKILL.
    """
    os.setsid()
    port = free_port()
    os.environ.update(
        WORLD_SIZE=str(len(faults)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    if agent:
        os.environ.update(
            TORCHELASTIC_RUN_ID="drill", TORCHELASTIC_RESTART_COUNT="0",
            TORCHELASTIC_USE_AGENT_STORE="True",
        )  # fmt: skip
    ranks = []
    for rank, fault in faults.items():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        ranks.append(fork(lambda fault=fault: _child(script, args, log, fault, folder)))
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False) if agent else None
    code = 0
    signal.signal(signal.SIGALRM, lambda number, frame: _signal(ranks, signal.SIGKILL))
    while ranks:
        process, status = os.wait()
        ranks.remove(process)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            _signal(ranks, signal.SIGTERM)
            signal.alarm(5)
    del store  # which lives as long as the ranks
    os._exit(code if code >= 0 else 128 - code)


def _signal(processes: Sequence[int], number: int) -> None:
    for process in processes:
        os.kill(process, number)


def members(session: int) -> list[int]:
    """The processes of a session that live; each job has one of its own."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            words = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue
        if entry.isdecimal() and words[3] == str(session) and words[0] not in "ZX":
            found.append(int(entry))
    return found


def end_session(session: int) -> None:
    """Kill all processes of a job."""
    for process in members(session):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _session_ends(session: int, deadline: float) -> bool:
    """Wait until no process of a job is left; say whether that came by itself."""
    while members(session):
        if time.monotonic() > deadline:
            end_session(session)
            return False
        time.sleep(0.01)
    return True


def random_fault(rng: random.Random, fault: Fault, events: int) -> Fault:
    """The same fault at one of the events, all equally likely."""
    return replace(fault, event=rng.randint(1, max(1, events)))
