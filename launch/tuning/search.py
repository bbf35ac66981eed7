"""Search by trials: Optuna proposes settings, each is run with every seed, a round at a time.

The one module that imports `optuna`. The study is a SQLite file: a search that was stopped goes on,
and several processes may work on one study.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from letheon.engine.checkpoints.method_state import State
from letheon.engine.checkpoints.sweep_state import Sweeps
from letheon.engine.distributed import Ranks, gather_objects
from letheon.engine.loop import Seconds
from letheon.engine.method import Accuracies, Decision, Method, Run
from letheon.engine.models.teacher import Teachers
from letheon.engine.passes.one_pass import Log
from letheon.engine.runs.plan import Plan
from letheon.engine.runs.several import NamedPlan, group_by_memory
from letheon.engine.runs.stop import Poll, defer
from letheon.engine.runs.together import Member, run_together
from letheon.errors import InputError, RunFailed, install_extra
from letheon.folders import wait_for_lock
from letheon.launch.tuning.objective import Target, accuracies
from letheon.launch.tuning.ranges import Range, replace_settings
from letheon.loaders.batch import Loader
from letheon.methods.wrapper import Wrapper

WORST = 1.0
"""Value of settings with which a run fails: the largest gap there is."""
_STORES = ("optuna", "sqlalchemy", "sqlite3")  # packages whose errors are the study's
STARTUP = 5
"""Trials that are run to their end before a hopeless one is stopped."""


@dataclass(frozen=True)
class Watch(Wrapper):
    """The method inside, with a look at the measured images after each epoch."""

    name: ClassVar[str] = "watch"
    look: Callable[[int, Accuracies], bool]
    """(epoch, accuracies) -> whether the run is hopeless, equal on every rank."""

    @property
    def watches_epochs(self) -> bool:
        """Always."""
        return True

    @property
    def reads_accuracies(self) -> Literal["all", "forget", "none"]:  # type: ignore[override]
        """Always."""
        return "all"

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        """Decide as the inner method does, or stop a hopeless run."""
        decision: Decision = "go on"
        if self.inner.watches_epochs:
            decision = super().after_epoch(run, state, accuracies)
        last = run.epoch_number == run.recipe.epochs - 1
        if decision == "go on" and not last and self.look(run.epoch_number, accuracies):
            return "stop"
        return decision


@dataclass
class Trial:
    """Proposed settings and what their runs came to; equal on every rank."""

    number: int
    values: dict[str, Any]
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By seed: forget and retain accuracy, gap, seconds; or why it failed."""
    hopeless: bool = False


def lock_of(study: Path) -> Path:
    """Return the file that the processes of a study lock; it may be there before the study."""
    return study.with_suffix(".lock")


class Study:
    """The first rank's Optuna study; on the others every call passes on what that one says."""

    def __init__(self, file: Path, facts: Mapping[str, Any], ranks: Ranks, seed: int):
        """Open or make the study; `facts` are what it searches, for all its processes.

        Raises:
            InputError: on every rank: no optuna, or a study of something else.
        """
        self.ranks, self._seed, self._file = ranks, seed, file
        self._open: dict[int, Any] = {}
        self._optuna = load_optuna()
        if ranks.main:
            self._study = self._load()
            with self._lock():
                before = self._study.user_attrs.get("facts")
                if before is None:
                    self._study.set_user_attr("facts", dict(facts))
                self._close_left()
            odd = [k for k in facts if before is not None and before.get(k) != facts[k]]
            if odd:
                raise InputError(
                    f"got {file.parent}, which holds a search with {odd[0]} {before.get(odd[0])}, "
                    f"for one with {facts[odd[0]]}; expected the same; name another folder",
                    option="out",
                )

    def _load(self) -> Any:
        optuna = self._optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
        storage = f"sqlite:///{self._file.resolve()}"
        try:
            with self._lock():
                return optuna.create_study(
                    storage=storage, study_name="letheon", pruner=pruner, load_if_exists=True
                )
        except Exception as error:  # of the file system or one of three packages
            raise InputError(
                f"got {self._file}, which cannot be opened as a study ({_reason(error)}); "
                "expected that of a search, and a folder that can be written; name another",
                option="out",
            ) from error

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Let no other process of the study propose trials, close them or make tables meanwhile.

        A running trial that names no process is then one of a process that died in here.
        """
        with wait_for_lock(lock_of(self._file)):
            yield

    def _sampler(self, number: int) -> Any:
        """Return what proposes a trial, by seed and number: no two processes propose the same."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is called experimental
            return self._optuna.samplers.TPESampler(
                seed=self._seed * 1_000_003 + number, constant_liar=True
            )

    def _close_left(self) -> None:
        """Close the trials of processes of this host that have died."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == self._optuna.trial.TrialState.RUNNING and not self._lives(trial):
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def list_finished(self) -> list[Any]:
        """Trials that count: run to their end, or stopped as hopeless."""
        states = self._optuna.trial.TrialState
        return list(self._study.get_trials(states=(states.COMPLETE, states.PRUNED)))

    def ask(
        self, count: int, budget: int, ranges: Sequence[Range], start: Mapping[str, Any]
    ) -> list[Trial]:
        """Propose at most `count` trials, so that no more than `budget` count in all.

        The first of a study has the method's own settings, `start`; again where it was cut off.
        """
        proposed: list[Trial] = []
        if self.ranks.main:
            with self._lock():
                proposed = self._propose(count, budget, ranges, start)
        return gather_objects(proposed, self.ranks)[0]

    def _propose(
        self, count: int, budget: int, ranges: Sequence[Range], start: Mapping[str, Any]
    ) -> list[Trial]:
        states = self._optuna.trial.TrialState
        running = self._study.get_trials(deepcopy=False, states=(states.RUNNING,))
        spent = len(self.list_finished()) + sum(self._lives(trial) for trial in running)
        trials = self._study.get_trials(deepcopy=False)
        if start and all(trial.state == states.FAIL for trial in trials):
            self._study.enqueue_trial(dict(start), skip_if_exists=not trials)
        proposed = []
        for _ in range(min(count, budget - spent)):
            trial = self._study.ask()
            self._study.sampler = self._sampler(trial.number)
            trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")
            values = {one.name: one.suggest(trial) for one in ranges}
            self._open[trial.number] = trial
            proposed.append(Trial(trial.number, values))
        return proposed

    def hopeless(self, trial: Trial, gap: float, step: int) -> bool:
        """Report a gap on the way; whether it is above the median of the earlier trials'."""
        word = False
        if self.ranks.main:
            own = self._open[trial.number]
            own.report(gap, step)
            word = bool(own.should_prune())
        return gather_objects(word, self.ranks)[0]

    def tell(self, trial: Trial) -> None:
        """Close a trial with the mean gap over its seeds."""
        if not self.ranks.main:
            return
        own = self._open.pop(trial.number)
        own.set_user_attr("runs", {str(seed): facts for seed, facts in trial.runs.items()})
        if trial.hopeless:
            self._study.tell(own, state=self._optuna.trial.TrialState.PRUNED)
        else:
            gaps = [facts["gap"] for facts in trial.runs.values()]
            self._study.tell(own, sum(gaps) / len(gaps))

    def close_open(self) -> None:
        """Close the trials of this process that will not be run to their end; they do not count."""
        for number in list(self._open):
            with suppress(Exception):  # what has ended the search is the error to show
                self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
            del self._open[number]

    def _lives(self, trial: Any) -> bool:
        """Whether the process of a running trial may still be at work."""
        host, _, number = str(trial.user_attrs.get("process", "")).rpartition(":")
        if host != socket.gethostname():
            return bool(host)
        if int(number) == os.getpid():  # or that of an earlier process with the same number
            return trial.number in self._open
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def load_optuna() -> Any:
    """Import Optuna.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            f"got no package optuna ({error}); expected it for a search; {install_extra('tune')}"
        ) from error
    return optuna


@dataclass(frozen=True)
class Search:
    """All that the trials of one search share."""

    study: Study
    method: Method
    seeds: tuple[int, ...]
    plan: Callable[[Method, int, Loader | None], tuple[Plan, Run]]
    open_measured: Callable[[Run], Loader]
    target: Target
    prune: bool
    poll: Poll

    def run(self, ranges: Sequence[Range], start: Mapping[str, Any], budget: Budget) -> None:
        """Run trials until the budget is spent; what is saved so far is in the study.

        Raises:
            Stopped: a signal came.
            InputError: the method refuses values of the ranges.
            RunFailed: the study cannot be written.
        """
        try:
            self._run(ranges, start, budget)
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in _STORES:
                raise
            raise RunFailed(
                f"got {_reason(error)} while writing the study; expected room and a disk that can "
                "be written; free space, and run again: the trials that ended are kept"
            ) from error
        finally:
            self.study.close_open()

    def _run(self, ranges: Sequence[Range], start: Mapping[str, Any], budget: Budget) -> None:
        shared: dict[Any, Any] = {}
        teachers = Teachers()
        ranks = self.study.ranks
        while not gather_objects(budget.over, ranks)[0]:
            trials = self.study.ask(budget.at_once, budget.trials, ranges, start)
            if not trials:
                return
            jobs: list[tuple[Trial, int, NamedPlan]] = []
            for trial in trials:
                method = replace_settings(self.method, trial.values)
                for seed in self.seeds:
                    like = jobs[0][2].run.loader if jobs else None
                    plan, run = self.plan(method, seed, like)
                    run.shared, run.held_out = shared, lambda run=run: self.open_measured(run)
                    run.teachers = teachers
                    name = f"trial {trial.number} seed {seed}"
                    run.sweeps = Sweeps(None, self.poll, Path(name))  # a signal is heard
                    jobs.append((trial, seed, NamedPlan(name, method, plan, run, Path())))
            groups, _ = group_by_memory([job for _, _, job in jobs], ranks)
            by_name = {job.name: (trial, seed) for trial, seed, job in jobs}
            for group in groups:
                defer(True)
                try:
                    members = [self._member(*by_name[job.name], job) for job in group]
                    failed = run_together(members, ranks, self.poll)
                finally:
                    defer(False)
                for name, error in failed.items():
                    if not isinstance(error, RunFailed | InputError):
                        raise error
                    trial, seed = by_name[name]
                    trial.runs[seed] = {"gap": WORST, "failed": str(error)}
            for trial in trials:
                self.study.tell(trial)

    def _member(self, trial: Trial, seed: int, job: NamedPlan) -> Member:
        ranks = self.study.ranks
        number = self.seeds.index(seed)

        def look(epoch: int, values: Accuracies) -> bool:
            if trial.hopeless:
                return True
            forget, retain = values.held_out_forget, values.held_out_retain
            assert forget is not None and retain is not None
            step = epoch * len(self.seeds) + number
            trial.hopeless = self.study.hopeless(trial, self.target.gap(forget, retain), step)
            return trial.hopeless

        def begin() -> tuple[Run, Log, None]:
            job.plan.seed_torch(ranks)
            run = dataclasses.replace(job.run, model=copy.deepcopy(job.run.model))
            return run, lambda *_, **__: None, None

        def end(run: Run, seconds: Seconds) -> None:
            forget, retain = accuracies(run, run.model, self.open_measured(run))
            trial.runs[seed] = {
                "gap": self.target.gap(forget, retain), "forget": forget, "retain": retain,
                "seconds": round(seconds.prepare + seconds.train, 3),
            }  # fmt: skip

        watches = self.prune and job.run.recipe.epochs > 1
        method = Watch(job.method, look) if watches else job.method
        return Member(job.name, method, begin, end)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class Budget:
    """How many trials, in all and at once, and until when."""

    def __init__(self, trials: int, at_once: int, minutes: float | None):
        self.trials, self.at_once = trials, at_once
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        """Whether the minutes are spent."""
        return self._end is not None and time.monotonic() >= self._end
