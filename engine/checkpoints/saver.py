"""Save a run while it goes on, and go on with one that was stopped."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from letheon.engine.checkpoints.loop_state import (
    Course,
    collect,
    repeat_choices,
    restore,
    share_state,
    without_weights,
)
from letheon.engine.checkpoints.model_file import save_model
from letheon.engine.checkpoints.run_state import (
    RunState,
    StateFolder,
    problem_of,
    save_on_first,
    wait_on_first,
)
from letheon.engine.checkpoints.sweep_state import Sweeps
from letheon.engine.distributed import Ranks
from letheon.engine.health import check_finite
from letheon.engine.memory.part_files import PART, TOKEN, PartFiles
from letheon.engine.memory.shards import host_state
from letheon.engine.method import Run
from letheon.engine.ranks.other_ranks import share_out_state
from letheon.engine.runs.run_folder import LAST_FINITE, LOG, STATE, Record, source_facts
from letheon.engine.runs.stop import GO_ON, STOP, Poll, defer, stop
from letheon.errors import InputError, RunFailed
from letheon.loaders.factory import kind_of
from letheon.progress import note

PREPARE = "prepare"
"""Folder in that of the states: what the passes before training have added up to."""
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class SaveOptions:
    """When a run is saved while it goes on, and what a resumed run may differ in."""

    save_every: str = "10min"
    """Save the state of the run every so often: 10min, 30s, 2h, or 500steps; also at an epoch's end
    once a tenth of the time has passed. off: only when a signal stops the run."""
    resume_anyway: bool = False
    """Go on with an unfinished run although settings, data or versions differ; recorded."""

    def __post_init__(self) -> None:
        """Refuse what is neither a time nor a number of steps."""
        self.interval  # noqa: B018

    @property
    def interval(self) -> tuple[float, int]:
        """Seconds and steps from one save to the next; 0: never.

        Raises:
            InputError: neither a time nor a number of steps.
        """
        if self.save_every == "off":
            return 0.0, 0
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|h|steps?)", self.save_every)
        number = float(match[1]) if match else 0.0
        if match is None or number <= 0 or ("step" in match[2] and number != int(number)):
            raise InputError(
                f"got {self.save_every}; expected a time or a number of steps, such as 10min, 2h "
                "or 500steps, or off; give one",
                option="save_every",
            )
        if match[2] in _UNITS:
            return number * _UNITS[match[2]], 0
        return 0.0, int(number)


@dataclass
class Saver:
    """Keeps the states of one run; the loop asks it after steps and epochs. Alike on every rank."""

    record: Record
    poll: Poll
    ranks: Ranks
    previous: RunState | None = None
    """The state that the run goes on from."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Where the run was resumed before, and what differed then; for the record."""
    overrides: Sequence[str] = ()
    """What differs from the run as it was begun, and is overlooked."""

    def __post_init__(self) -> None:
        """Find the folders of the states."""
        folder = self.record.folder
        self.states = StateFolder(folder / STATE, folder / LOG)
        self.parts = PartFiles(folder / STATE, self.ranks)
        self._sweeps = Sweeps(folder / STATE / PREPARE, self.poll, folder)
        self._course: Course | None = None
        self._finite: tuple[int, dict[str, Tensor]] | None = None

    def prepare(self, run: Run) -> None:
        """Before the run is prepared: choices of a trial, and sums over sets, are those saved."""
        if self.previous is not None:
            repeat_choices(run, self.previous.facts)
        run.sweeps = self._sweeps
        known = self._sweeps.load(
            {"images": run.images, "loader": kind_of(run.loader), **source_facts()}
        )
        if known and self.previous is None:
            self.history = [*self._sweeps.history, self.event({})]
        self._sweeps.history = self.history

    def event(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Say for the record where the run goes on: a state's facts, or none in its preparation."""
        place = {name: facts.get(name, 0) for name in ("epoch", "phase", "steps")}
        world = facts.get("world", self.ranks.world)
        return {**place, "world": world, "overrides": list(self.overrides)}

    def start(self, course: Course) -> RunState | None:
        """Before the first step: become the state that was found; without its weights, mostly."""
        self._course = course
        self._sweeps.close()
        defer(True)
        found, self.previous = self.previous, None
        if found is not None:
            found = self.parts.join(found, course.run.shards is not None)
            restore(course, found)
            found.facts["world"] = self.ranks.world  # if its pass is repeated, it is saved again
            self.cut_log(found)
            if course.run.recipe.on_nonfinite != "rollback":
                found = without_weights(found, self.ranks)
        self.poll.reset()
        return found

    def after_step(self) -> None:
        """Save where it is time to.

        Raises:
            Stopped: a signal came; the state is on disk.
            RunFailed: the last state could not be written, or numbers are not finite: what was
                saved before stays.
        """
        course = self._course
        assert course is not None
        word = self.poll.after_step(lambda: course.now is not None and course.now.watch.broken())
        if word != GO_ON:
            self.save()
            self.poll.reset()
        if word == STOP:
            self.wait()
            stop(self.place)

    def after_epoch(self) -> None:
        """The same at the end of an epoch with another to come, whose first step may be the last.

        Raises:
            RunFailed: as `after_step`.
        """
        if self.poll.after_epoch() != GO_ON:
            self.save()
            self.poll.reset()

    def note_finite(self, epoch: int) -> None:
        """Keep the weights at the end of an epoch, all sound, on the first rank's host."""
        assert self._course is not None
        weights = host_state(self._course.run.model, self.ranks)
        if self.ranks.main:
            self._finite = (epoch, weights)

    def fail(self, reason: Exception) -> None:
        """Mark the run as failed; keep the weights of the last epoch that ended in sound ones."""
        if self._finite is not None and self._course is not None:
            epoch, weights = self._finite
            model, path = self._course.run.model, self.record.folder / LAST_FINITE
            with suppress(RunFailed):  # a full disk: the reason itself is what counts
                save_model(path, model, {"epoch": str(epoch)}, weights)
                note(f"{path}: the weights at the end of epoch {epoch}, the last that are sound")
        self.record.fail(reason)

    @property
    def place(self) -> str:
        """Where the run is, for people."""
        course = self._course
        assert course is not None
        taken = course.position
        if course.now is not None and course.now.doomed and course.anchor is not None:
            taken = course.anchor.position
        return f"{self.record.folder}: saved after step {taken}, in epoch {course.epoch}"

    def note_log(self, state: RunState) -> None:
        """Note in a state how long metrics.jsonl is now, and the digest of its last line."""
        state.facts.update(metrics=self.record.length, link=self.record.link)

    def cut_log(self, state: RunState) -> None:
        """Drop the lines of metrics.jsonl since a state: they will be written again."""
        self.record.cut(state.facts["metrics"], state.facts["link"])

    def save(self) -> None:
        """Copy the state to the host and begin to write it; raises as `after_step`.

        Of a pass that will be rolled back, the state from which it is repeated is written.
        """
        course = self._course
        assert course is not None
        if course.now is not None and course.now.doomed:
            state = course.anchor
        else:
            _refuse_unsound(course)
            state = collect(course)
            if self.ranks.main and state is not None:
                self.note_log(state)
        facts: dict[str, Any] = {} if state is None else {**state.facts, "history": self.history}
        if state is not None and state.below(PART):
            self.wait()  # on all ranks, so that one state is whole at any time
            state = self.parts.save(RunState(state.tensors, facts))
        elif state is not None:
            state = RunState(state.tensors, facts)
        save_on_first(self.states, state if self.ranks.main else None, self.ranks)

    def wait(self) -> None:
        """Wait until all is on disk."""
        self.parts.wait()
        wait_on_first(self.states, self.ranks)

    def finish(self) -> None:
        """The weights are safe: let the last write end; its failure is no longer one of the run."""
        for problem in filter(None, [problem_of(self.states.wait), problem_of(self.parts.wait)]):
            print(f"warning: {self.record.folder}: {problem}", file=sys.stderr)


def _refuse_unsound(course: Course) -> None:
    """Raise RunFailed on every rank where a loss or a weight is not finite; nothing is saved."""
    if course.now is not None:
        course.now.watch.refuse()
    check_finite(course.run, f"after step {course.position}")


def open_saver(record: Record, poll: Poll, resume: bool, overrides: Sequence[str] = ()) -> Saver:
    """Open the states of a run's folder, with the newest whole one, for any number of ranks.

    Args:
        record: the run's folder.
        poll: when to save; shared by the runs of one process.
        resume: whether to go on at all; without, the states there are removed.
        overrides: what differs from the run as it was begun, for the record.
    """
    ranks = poll.ranks
    saver = Saver(record, poll, ranks, overrides=overrides)
    folder = saver.states
    found: RunState | None = None
    if ranks.main and not resume:
        saver.parts.clear()
        folder.clear()
    damaged: list[str] = []
    refused: dict[Any, str] = {}  # token of a state without all its parts -> what is amiss
    while resume:
        if ranks.main:
            found, damaged = folder.load(lambda facts: _is_whole(facts, record, refused))
        found = share_state(found, ranks)
        if found is None or not found.facts.get("split"):
            break
        problem = saver.parts.check(found.facts)
        if not problem:
            break
        refused[found.facts.get(TOKEN)] = problem
        found = None
    for line in damaged:
        print(line, file=sys.stderr)
    if found is not None:
        saver.previous = share_out_state(found, ranks.world)
        saver.history = [*found.facts["history"], saver.event(found.facts)]
    elif resume and ranks.main:
        record.cut(0)
    return saver


def _is_whole(facts: Mapping[str, Any], record: Record, refused: Mapping[Any, str]) -> bool:
    """True; raises ValueError where lines of the log that were before the state are missing, or
    parts of a network that was split."""  # noqa: D205, D209
    if facts.get("split") and facts.get(TOKEN) in refused:
        raise ValueError(refused[facts.get(TOKEN)])
    if facts["metrics"] > record.length:
        raise ValueError(f"{LOG} has {record.length} bytes of {facts['metrics']}")
    return True
