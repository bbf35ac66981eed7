"""The faults of the drill: each attempt injects one and says how it ended.

An attempt is a function of its row and number alone, so a drill that was stopped goes on.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.drill.processes import (
    End,
    Fault,
    fork,
    kill_launcher,
    kill_self,
    random_fault,
    run_job,
    stop_self,
)
from tests.drill.scripts import Base, Job, last_line, run_digest, table_digest
from tests.launch_tools import ROOT

HANG = 3.0
"""Seconds that a rank waits for another in the drill of one that stands still."""


@dataclass
class Outcome:
    """What became of one attempt."""

    row: str
    kind: str
    number: int
    faults: int = 0
    """Times that the fault struck."""
    outcome: str = ""
    lost: int = 0
    """States that had been saved and were not gone on with."""
    wrong: int = 0
    """Results that were trusted and differ, runs that could not be brought to an end, and
    processes that stayed."""
    notes: list[str] = field(default_factory=list)

    def fail(self, note: str) -> None:
        """Count something that may not be."""
        self.wrong += 1
        self.notes.append(note)


@dataclass
class Drill:
    """What every attempt needs: the base, the undisturbed ends of all jobs, a scratch folder."""

    base: Base
    scratch: Path
    expected: dict[str, str] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    """Events that each rank of a job has, below its folder and of other kinds: `event_key`."""

    def learn(self) -> None:
        """Count the events of every job that faults strike, by undisturbed runs, two at least.

        What does not repeat cannot be compared.
        """
        for name, job in self.base.jobs().items():
            kinds = sorted(find_kinds(name, job))
            for within in (*kinds, "", "")[: max(2, len(kinds))]:
                folder = self.clean(f"learn-{job.script}")
                none = Fault(kill_self, 0, within)
                end = job.run(folder, faults=dict.fromkeys(range(job.world), none))
                digest = job.digest(folder / job.out) if end.code == 0 else end.text
                if self.expected.setdefault(name, digest) != digest:
                    raise SystemExit(f"the drill's job {name} does not repeat itself: {digest}")
                for rank, count in end.events.items():
                    self.events[event_key(name, rank, within)] = count

    def clean(self, name: str) -> Path:
        """An empty folder."""
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def bring_to_an_end(self, job: Job, folder: Path, found: Outcome, expected: str) -> None:
        """Give the same line again until it ends; compare its end."""
        end = End(0, "")
        for _ in range(3):
            if job.is_whole(folder):
                break
            end = job.run(folder)
            if end.hung:
                found.fail("hung")
            if end.code == 0:
                break
        if not job.is_whole(folder):
            found.fail(f"could not be brought to an end: {last_line(end.text)}")
        elif job.digest(folder / job.out) != expected:
            found.fail("ended elsewhere")


def find_kinds(name: str, job: Job) -> set[str]:
    """Kinds of events of a job that faults strike (`Fault.within`)."""
    kinds = {fault.within for of, faults, _ in KILLS.values() if of == name
             for fault in faults.values()}  # fmt: skip
    kinds |= {within for of, _, within in STOPS.values() if of == name}
    kinds |= {""} if name in FULL else set()
    return kinds | ({"step"} if "" in kinds and job.saves else set())  # as `kill` may choose


def event_key(name: str, rank: int, within: str) -> str:
    """Name events: of a rank of a job, of a kind (`Fault.within`)."""
    return f"{name}, rank {rank}: {within}"


def states_of(folder: Path) -> bool:
    """Whether a complete state of a run lies in the folder."""
    return any(folder.rglob("state/*.json"))


KILLS: dict[str, tuple[str, dict[int, Fault], float]] = {
    "train": ("train", {0: Fault(kill_self, 1)}, 3),
    "train, while saving": ("train", {0: Fault(kill_self, 1, "/state/")}, 2),
    "forget (salun)": ("forget", {0: Fault(kill_self, 1)}, 3),
    "several runs in one call": ("several runs in one call", {0: Fault(kill_self, 1)}, 3),
    "train --overwrite": ("train", {0: Fault(kill_self, 1)}, 2),
    "rank 1 of two": ("train on two ranks", {1: Fault(kill_self, 1, "step")}, 1),
    "rank 0 of two, while saving": ("train on two ranks", {0: Fault(kill_self, 1, "/state/")}, 2),
    "rank 1 of two, while saving its part": (
        "train split over two ranks",
        {1: Fault(kill_self, 1, "/state/")},
        1,
    ),
    "rank 0 of two, evaluate": ("evaluate on two ranks", {0: Fault(kill_self, 1, "exchange")}, 1),
    "rank 1 of two, evaluate": ("evaluate on two ranks", {1: Fault(kill_self, 1, "exchange")}, 1),
    "rank 2 of three, evaluate": (
        "evaluate on three ranks",
        {2: Fault(kill_self, 1, "exchange")},
        1,
    ),
    "rank 0 of three, mask": ("mask on three ranks", {0: Fault(kill_self, 1, "exchange")}, 1),
    "rank 2 of three, mask": ("mask on three ranks", {2: Fault(kill_self, 1, "step")}, 1),
    "launcher of two ranks": ("train on two ranks", {0: Fault(kill_launcher, 1)}, 1),
    "prepare beton": ("prepare beton", {0: Fault(kill_self, 1)}, 2),
    "prepare arrays": ("prepare arrays", {0: Fault(kill_self, 1)}, 2),
    "evaluate": ("evaluate", {0: Fault(kill_self, 1)}, 2),
    "evaluate, stored": ("evaluate, stored", {0: Fault(kill_self, 1)}, 2),
    "forget the hardest (influence)": ("forget the hardest", {0: Fault(kill_self, 1)}, 2),
    "mask": ("mask", {0: Fault(kill_self, 1)}, 1),
}
"""Kind -> its job, where the fault strikes, and its share of the attempts."""


def kill(drill: Drill, kind: str, number: int) -> Outcome:
    """Up to two SIGKILLs at random events, steps or moments; then the same line to its end."""
    rng = random.Random(f"kill {kind} {number}")
    name, faults, _ = KILLS[kind]
    job = drill.base.jobs()[name]
    folder = drill.clean("kill")
    found = Outcome("SIGKILL", kind, number)
    old = None
    if "--overwrite" in kind:
        shutil.copytree(drill.base.folder / "original", folder / job.out)
        old = run_digest(folder / job.out)
        job = Job(job.name, job.script, (*job.args, "--overwrite"), job.out, job.digest, job.marks,
                  saves=True)  # fmt: skip
    for _ in range(rng.choice((1, 1, 2))):
        rank, fault = next(iter(faults.items()))
        if not fault.within and job.saves and rng.random() < 0.4:
            fault = Fault(fault.act, 1, "step")
        known = drill.events[event_key(name, rank, fault.within)]
        before = states_of(folder)
        if fault.act is kill_self and job.world == 1 and rng.random() < 0.25:
            end = job.run(folder, after=rng.uniform(0.05, 1.5))
        else:
            end = job.run(folder, faults={rank: random_fault(rng, fault, known)})
        if before and end.code in (0, -9, 137) and "goes on with" not in end.text and job.saves:
            found.lost += end.code == 0
        if end.hung:
            found.fail("a process stayed")
        if end.code == 0:
            break
        found.faults += 1
        whole = job.is_whole(folder)
        if whole and job.digest(folder / job.out) not in (drill.expected[name], old):
            found.fail("a torn result was taken for a finished one")
        if old is not None and not whole and not (folder / f".{job.out}.old").exists():
            found.fail("neither the old run nor the new one is there")
        if whole and old is None:
            break
    if old is not None:
        end = job.run(folder)  # once more: replaces, or goes on
        if end.code or job.digest(folder / job.out) != drill.expected[name]:
            found.fail(f"ended elsewhere: {last_line(end.text)}")
    else:
        resumable = states_of(folder) and not job.is_whole(folder)
        if resumable and job.saves:
            end = job.run(folder)
            if end.code == 0 and "goes on with the unfinished run" not in end.text:
                found.lost += 1
        drill.bring_to_an_end(job, folder, found, drill.expected[name])
    found.outcome = "ended as the undisturbed run" if not found.wrong else "WRONG"
    return found


FLIPS: dict[str, float] = {
    "saved state": 4, "run folder, evaluated": 4, "run folder, started from": 2, "mask": 2,
    "beton": 3, "arrays": 3, "prepared list": 1, "stored outputs": 4,
}  # fmt: skip


@dataclass
class Use:
    """What a damaged thing is used for: its job, and what the undamaged one gives."""

    victim: Path
    job: Job
    expected: str


def _use(drill: Drill, kind: str, folder: Path) -> Use:
    """Copy what is to be damaged into the folder, and say how it is used."""
    base = drill.base
    training = (*base.training, "--lr", "0.05", "--epochs", "1")

    def copy(name: str) -> Path:
        source = base.folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        return folder / name

    if kind == "saved state":
        shutil.copytree(drill.scratch / "stopped", folder, dirs_exist_ok=True)
        job = base.jobs()["train"]
        return Use(folder / job.out, job, drill.expected["train"])
    if kind == "run folder, evaluated":
        victim = copy("finetuned")
        job = Job(kind, "evaluate", base.evaluating(victim), "table", table_digest)
    elif kind == "run folder, started from":
        victim = copy("original")
        args = (*base.data, "--weights", str(victim), "--forget", "class:2", "--accept-chance",
                "//", "finetune", "--epochs", "1", "--batch-size", "16")  # fmt: skip
        job = Job(kind, "forget", args, "run", run_digest)
    elif kind == "mask":
        victim = copy("mask.safetensors")
        args = (*base.forgetting, "//", "salun", "--mask", str(victim), "--density", "0.5",
                "random-label", "--epochs", "1", "--batch-size", "16")  # fmt: skip
        job = Job(kind, "forget", args, "run", run_digest)
    elif kind == "stored outputs":
        victim = copy("outputs")
        args = (*base.evaluating(base.folder / "finetuned"), "--cache", str(victim))
        job = Job(kind, "evaluate", args, "table", table_digest)
    else:
        victim = copy("set-" + kind.rpartition(" ")[2])
        args = tuple(str(victim) if "images" in word else word for word in training)
        job = Job(kind, "train", args, "run", run_digest)
    return Use(victim, job, drill.expected.get(f"flip {kind}", ""))


def flip(drill: Drill, kind: str, number: int) -> Outcome:
    """One bit of one file turned over; then the thing is used."""
    rng = random.Random(f"flip {kind} {number}")
    folder = drill.clean("flip")
    found = Outcome("bit flip", kind, number, 1)
    use = _use(drill, kind, folder)
    if not use.expected:
        if use.job.run(folder).code:
            raise SystemExit(f"the drill could not use an undamaged {kind}")
        use.expected = drill.expected[f"flip {kind}"] = use.job.digest(folder / use.job.out)
        shutil.rmtree(folder / use.job.out)
    files = [use.victim] if use.victim.is_file() else sorted(
        path for path in use.victim.rglob("*") if path.is_file() and path.stat().st_size
    )  # fmt: skip
    file = rng.choices(files, [path.stat().st_size ** rng.choice((0, 1)) for path in files])[0]
    content = bytearray(file.read_bytes())
    place = rng.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    end = use.job.run(folder)
    what = f"{file.relative_to(folder)}, bit {place}"
    if end.hung or "Traceback" in end.text or end.code not in (0, 2, 3):
        found.fail(f"{what}: exit {end.code}, {last_line(end.text)}")
        found.outcome = "WRONG"
    elif end.code:
        named = any(str(one) in end.text for one in (file.name, file.parent.name, use.victim.name))
        found.outcome = "refused by name" if named else "refused"
        if not named:
            found.fail(f"{what}: the refusal does not name it: {last_line(end.text)}")
    elif _same(use, folder):
        told = "damaged" in end.text or "left out" in end.text or "is not what" in end.text
        found.outcome = "named, and done without it" if told else "harmless: same result"
        if "run folder" in kind and not told:
            _verify(use.victim, found, what)
    elif kind == "saved state":
        _verify(folder / use.job.out, found, what)
    else:
        found.fail(f"{what}: accepted, and the result is another")
        found.outcome = "WRONG"
    return found


def _same(use: Use, folder: Path) -> bool:
    """Whether the use ended as with the undamaged thing."""
    try:
        return use.job.digest(folder / use.job.out) == use.expected
    except ValueError:  # a log that is no JSON
        return False


def _verify(run: Path, found: Outcome, what: str) -> None:
    """What was used without a word must be found by `letheon verify`."""
    end = run_job("verify", [str(run)], run.parent)
    if end.code == 3 and "mismatch" in end.text:
        found.outcome = "same result; found by verify"
    else:
        found.fail(f"{what}: not found by verify: {last_line(end.text)}")


FULL = {"train": 4.0, "forget": 4.0, "prepare beton": 2.0, "prepare arrays": 2.0, "evaluate": 3.0}


def fill_disk(drill: Drill, kind: str, number: int) -> Outcome:
    """A small tmpfs is full from a random event on; then space is freed."""
    rng = random.Random(f"disk {kind} {number}")
    job = drill.base.jobs()[kind]
    mount = drill.clean("disk")
    found = Outcome("full disk", kind, number, 1)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "drill", str(mount)], check=True)
    try:
        folder = mount / "place"
        folder.mkdir()
        before = rng.randint(1, max(1, drill.events[event_key(kind, 0, "")]))
        end = job.run(folder, faults={0: Fault(partial(_fill, mount), before)})
        named = str(folder) in last_line(end.text)
        states = states_of(folder)
        (mount / "filler").unlink(missing_ok=True)
        if "Traceback" in end.text or end.hung or end.code not in (0, 2, 3):
            found.fail(f"event {before}: exit {end.code}, {last_line(end.text)}")
        elif end.code and not named:
            found.fail(f"event {before}: the file is not named: {last_line(end.text)}")
        if end.code == 0 and job.digest(folder / job.out) != drill.expected[kind]:
            if "could not be written" in end.text:
                found.outcome = "ended; missing lines of the log are told"
            else:
                found.fail(f"event {before}: ended elsewhere, exit 0")
        elif end.code == 0:
            found.outcome = "ended: nothing more was to be written"
        else:
            again = job.run(folder)
            if states and job.saves and "goes on with" not in again.text:
                found.lost += 1
            if again.code or job.digest(folder / job.out) != drill.expected[kind]:
                found.fail(f"event {before}: did not go on: {last_line(again.text)}")
            found.outcome = "one line names the file; went on once there was room"
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)
    if found.wrong:
        found.outcome = "WRONG"
    return found


def _fill(mount: Path) -> None:
    handle = os.open(mount / "filler", os.O_WRONLY | os.O_CREAT, 0o666)
    size = 2**20
    while size:
        try:
            os.write(handle, bytes(size))
        except OSError:
            size //= 2
    os.close(handle)


STOPS: dict[str, tuple[str, int, str]] = {
    "rank 0": ("train on two ranks", 0, "step"),
    "rank 1": ("train on two ranks", 1, "step"),
    "rank 0 with the store": ("train on two ranks", 0, "step"),
    "rank 0 with the store, killed": ("train on two ranks", 0, "step"),
    "rank 0, while saving": ("train on two ranks", 0, "/state/"),
    "rank 1, while saving its part": ("train split over two ranks", 1, "/state/"),
    "rank 1, evaluate": ("evaluate on two ranks", 1, "exchange"),
    "rank 0, evaluate, with the store": ("evaluate on three ranks", 0, "exchange"),
    "rank 2, evaluate": ("evaluate on three ranks", 2, "exchange"),
    "rank 1, mask": ("mask on three ranks", 1, "exchange"),
}
"""Kinds of the drill of a rank that stands still: the job, the rank, and where it does."""


def stop_rank(drill: Drill, kind: str, number: int) -> Outcome:
    """A rank stands still from a random step on, or dies while it keeps the ranks' store."""
    rng = random.Random(f"stop {kind} {number}")
    name, rank, within = STOPS[kind]
    job = drill.base.jobs()[name]
    folder = drill.clean("stop")
    found = Outcome("SIGSTOP", kind, number, 1)
    waiting = Job(job.name, job.script, (*job.args, "--timeout", str(HANG)), job.out, job.digest,
                  job.marks, job.world, job.saves, "store" not in kind)  # fmt: skip
    act = kill_self if "killed" in kind else stop_self
    fault = Fault(act, rng.randint(1, drill.events[event_key(name, rank, within)]), within)
    end = waiting.run(folder, faults={rank: fault})
    if end.hung or end.code == 0:
        found.fail(f"the rank that stood still was not found: exit {end.code}")
    stacks = [path for path in folder.rglob("*") if "stack" in path.name]
    named = f"rank {rank}" in last_line(end.text)
    found.notes += [] if named else [f"not named: {last_line(end.text)}"]
    found.notes += [] if stacks else ["no stacks in the run folder"]
    drill.bring_to_an_end(job, folder, found, drill.expected[job.name])
    found.outcome = f"found{', named' * named}{', stacks written' * bool(stacks)}; resumed"
    if found.wrong:
        found.outcome = "WRONG"
    return found


def stop_a_training(drill: Drill) -> None:
    """Leave the folder of a killed training with two states, for the flips."""
    folder = drill.clean("stopped")
    job = drill.base.jobs()["train"]
    end = job.run(folder, faults={0: Fault(kill_self, 6, "step")})
    assert end.code == -9 and states_of(folder), end.text


def stop_and_resume(drill: Drill, kind: str, number: int) -> Outcome:
    """Four random steps of a method (or of a loader backend) after each of which the run stops."""
    rng = random.Random(f"resume {kind} {number}")
    stops = [rng.randint(1, 9) for _ in range(4)]
    every = rng.choice((1, 2, 3))
    folder = drill.clean("stops")
    found = Outcome("resume, bitwise", kind, number, len(stops))
    answer = folder / "answer"

    def compare() -> None:
        from tests.drill.resuming import differing_after

        answer.write_text("\n".join(differing_after(kind, folder, stops, every)))

    _, status = os.waitpid(fork(compare), 0)
    odd = answer.read_text().split() if status == 0 else [f"the child ended with {status}"]
    if odd:
        found.fail(f"after steps {stops}, saved every {every}: {', '.join(odd[:3])} differ")
    found.outcome = "WRONG" if odd else "equal to the bit"
    return found


def fuzz(drill: Drill, count: int, names: list[str]) -> Outcome:
    """Damaged inputs of some parsers, by the tests' own fuzzer."""
    found = Outcome("fuzzed input", ", ".join(names), count, count * len(names))
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.parsers", str(count), "11"]
    end = subprocess.run(
        [*command, str(drill.clean("fuzz")), *names], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    for line in end.stdout.splitlines():
        found.fail(line[:400])
    if end.returncode:
        found.fail(end.stderr[-400:])
    found.outcome = "WRONG" if found.wrong else "a result, or the one documented line"
    return found
