"""Several runs in one process, fed from one pass over the data wherever their passes can share it.

Each run has its own model, optimizer, state and random numbers and steps on the batches it would
have got alone, so it ends as it would have ended alone.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from letheon.engine.checkpoints.run_state import read_random, set_random
from letheon.engine.checkpoints.saver import Saver
from letheon.engine.distributed import Ranks
from letheon.engine.loop import Seconds, passes
from letheon.engine.method import Method, Run
from letheon.engine.passes.one_pass import Log, Pass
from letheon.engine.runs.progress import TrainingLine
from letheon.engine.runs.stop import GO_ON, STOP, Poll, check, stop
from letheon.errors import InputError, RunFailed
from letheon.loaders.backends.shared_pass import shared_pass, source
from letheon.loaders.batch import Batch

FEW = 3  # runs that the line about a stop names


@dataclass(frozen=True)
class Member:
    """One of several runs."""

    name: str
    method: Method
    start: Callable[[], tuple[Run, Log, Saver | None]]
    """Called once, right before it is prepared, under its own random numbers."""
    end: Callable[[Run, Seconds], object]
    """Called once it is trained, such as to save it; its memory is let go after that."""


def refuse_split(run: Run) -> None:
    """Refuse a run that is to be split over the ranks among several of one process.

    Raises:
        InputError: on every rank.
    """
    if run.splits:
        refusal = InputError(
            "got reduce shard with several runs in one call, which would share one network on each "
            "rank; start them one by one",
            option="reduce",
        )
        refusal.everywhere = True
        raise refusal


def run_together(
    members: Sequence[Member], ranks: Ranks, poll: Poll | None = None
) -> dict[str, Exception]:
    """Train all of them; each is ended as soon as its own training is over.

    Every rank must call, with the same members. `poll` says when they are saved, all at once.

    Returns:
        name -> what went wrong, for those that did not end. With several ranks only what every
        rank sees alike is survived: numbers that are not finite.

    Raises:
        InputError: the data cannot be read; the runs that had not ended do not end.
        Exception: with several ranks, whatever one of the runs raises.
        Stopped: a signal came; all runs that had started are saved.
    """
    failed: dict[str, Exception] = {}
    jobs = [_Job(member, ranks, failed) for member in members]
    for job in jobs:
        check(ranks)
        job.attempt(job.start)
    line = TrainingLine(ranks.main)
    learning = [job for job in jobs if job.now is not None]
    while waiting := [job for job in jobs if job.now is not None]:
        group = choose_group(waiting)
        for job in group:
            job.at.together = len(group)
            job.at.begin()
        others = [job.share_done for job in learning if job not in group]
        for readers, batch, beside in _watch(group, line, others):
            batch = batch.to(ranks.device)
            for k in readers:
                group[k].attempt(group[k].take, batch, beside)
            if poll is not None:
                _save(jobs, poll)
            if not any(job.now for job in group):
                break
        for job in group:
            job.attempt(job.advance)
    line.close()
    return failed


def _save(jobs: Sequence[_Job], poll: Poll) -> None:
    """Save all runs where it is time to."""
    # All are asked, so that each one's next answer is on its way.
    word = poll.after_step(
        lambda: any([job.now is not None and job.now.watch.broken() for job in jobs])
    )
    if word == GO_ON:
        return
    savers = [job.saver for job in jobs if job.now is not None and job.saver is not None]
    for job in jobs:
        job.attempt(job.save)
    poll.reset()
    if word == STOP:
        for saver in savers:
            saver.wait()
        more = f"; and {len(savers) - FEW} more beside them" if len(savers) > FEW else ""
        places = "; ".join(saver.place for saver in savers[:FEW]) + more
        stop(places or "within trials, which are made again; those that have ended are kept")


class _Job:
    """A member on its way: which pass it is at, and its own random numbers."""

    def __init__(self, member: Member, ranks: Ranks, failed: dict[str, Exception]):
        self.member, self.ranks, self.failed = member, ranks, failed
        self.seconds = Seconds()
        self.run: Run | None = None  # until it has started, and once it has ended
        self.now: Pass | None = None
        self.saver: Saver | None = None
        self._passes: Iterator[Pass] = iter(())
        self._random = read_random(ranks)

    @property
    def at(self) -> Pass:
        """The pass it is at, while there is one."""
        assert self.now is not None
        return self.now

    @property
    def share_done(self) -> float:
        """The share of its epochs that is over, between two passes; 1 once it has ended."""
        return 1.0 if self.now is None else self.now.shown().share_done(0.0)

    def start(self) -> None:
        """Up to its first pass."""
        self.run, log, self.saver = self.member.start()
        self._passes = passes(self.member.method, self.run, self.seconds, log, self.saver)
        self.advance()

    def take(self, batch: Batch, beside: Batch | None) -> None:
        """One step; nothing for a run that has failed."""
        if self.now is not None:
            self.now.take(batch, beside)

    def save(self) -> None:
        """Save its state, while it has one."""
        if self.now is not None and self.saver is not None:
            self.saver.save()

    def advance(self) -> None:
        """Close the pass it is at and find the next; without one it has ended."""
        if self.run is None:
            return
        self.now = next(self._passes, None)
        if self.now is None:
            self.member.end(self.run, self.seconds)
            self.run = None

    def attempt(self, work: Callable[..., None], *args: Batch | None) -> None:
        """Do the work under the run's own random numbers; a failure ends this run and no other."""
        outer = read_random(self.ranks)
        set_random(self._random, self.ranks)
        try:
            work(*args)
        except Exception as error:
            known = isinstance(error, RunFailed | InputError)
            # Numbers fail on every rank alike; a disk, a file or memory perhaps here alone.
            alike = isinstance(error, RunFailed) and error.__cause__ is None
            if self.ranks.world > 1 and not alike:
                raise  # or the others would wait for it
            if not known:
                traceback.print_exc(file=sys.stderr)
            self.failed[self.member.name] = error.with_traceback(None)  # which holds the memory
            self.run = self.now = None
            self._passes = iter(())
        finally:
            self._random = read_random(self.ranks)
            set_random(outer, self.ranks)


def choose_group(jobs: Sequence[_Job]) -> list[_Job]:
    """The runs whose next passes are made as one.

    Of those that share the first one's source: the earliest epoch, in it the runs that have the
    most passes still to come, so that all meet at the last; and those that read what one of these
    reads.
    """
    first = _source(jobs[0])
    if first is None:
        return [jobs[0]]
    near = [job for job in jobs if _source(job) == first]
    epoch = min(job.at.epoch for job in near)
    near = [job for job in near if job.at.epoch == epoch]
    most = max(job.at.part.later for job in near)
    reads = {job.at.phase.reads for job in near if job.at.part.later == most}
    return [job for job in near if job.at.phase.reads in reads]


def _source(job: _Job) -> Hashable:
    """Equal for runs whose next passes may be made as one; None for one that cannot share."""
    return source(job.at.loader, job.at.stream) if job.at.shareable else None


def _watch(
    group: Sequence[_Job], line: TrainingLine, others: Sequence[float]
) -> Iterator[tuple[list[int], Batch, Batch | None]]:
    """Yield which runs take which batch, and show how far they are."""
    streams = [job.at.stream for job in group]
    batches: Iterator[tuple[list[int], Batch, Batch | None]]
    if len(group) == 1:
        batches = (([0], batch, other) for batch, other in group[0].at.batches())
    else:
        skips = [job.at.skip for job in group]
        shared = shared_pass([job.at.loader for job in group], streams, group[0].at.epoch, skips)
        batches = ((readers, batch, None) for readers, batch in shared)
    apart = {
        (job.at.stream, job.at.run.recipe.batch_size, job.at.skip): (job.at.steps - job.at.skip)
        for job in group
    }
    shown = [job.at.shown(job.member.name) for job in group]
    steps = sum(apart.values())
    yield from line.watch(shown, batches, steps, lambda item: item[1].total, others)
