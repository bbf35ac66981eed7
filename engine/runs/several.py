"""Several planned runs trained in one process: which of them together, by memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from letheon.engine.checkpoints.saver import SaveOptions, Saver
from letheon.engine.distributed import Ranks
from letheon.engine.loop import Seconds
from letheon.engine.memory.sharding import count_parts
from letheon.engine.method import Method, Run
from letheon.engine.models.teacher import Teachers
from letheon.engine.numbers.image_memory import ImageMemory
from letheon.engine.passes.one_pass import Log
from letheon.engine.runs.origin import Start, plan_start
from letheon.engine.runs.plan import (
    Plan,
    check_knowledge,
    check_rows,
    finish_run,
    row_bytes,
    start_run,
)
from letheon.engine.runs.stop import Poll, defer
from letheon.engine.runs.together import Member, refuse_split, run_together
from letheon.errors import InputError, RunFailed
from letheon.loaders.backends.memory import free_bytes
from letheon.progress import note

IMAGES = 8  # one part in so many of the free memory is for images that statistics share
SHARE = 0.5  # of the free memory for weights and optimizers; the rest is for steps and images


@dataclass(frozen=True)
class NamedPlan:
    """One run whose input has been checked."""

    name: str
    method: Method
    plan: Plan
    run: Run  # its model is not trained in place: a copy is, made when its turn comes
    out: Path


def train_all(
    jobs: Sequence[NamedPlan],
    ranks: Ranks,
    saving: SaveOptions | None = None,
    overwrite: bool = False,
) -> None:
    """Train and save them, as many at once as fit; each leaves the folder of its own single run.

    Those that are finished are left out, and unfinished ones go on.

    Raises:
        RunFailed: some failed, such as by numbers that are not finite; the others are done.
        RuntimeError: some did not end for a fault of ours; the others are done.
        InputError: the data cannot be read.
    """
    for job in jobs:
        refuse_split(job.run)
        check_rows(job.method, job.run)
    saving = saving or SaveOptions()
    starts = {
        job.name: plan_start(job.plan, job.method, job.run, job.out, saving, overwrite)
        for job in jobs
    }
    done = [job.name for job in jobs if starts[job.name].finished]
    if len(done) == len(jobs):
        if ranks.main:
            note(f"all {len(jobs)} already done by the same command")
        return
    if done and ranks.main:
        note(f"finished before, and left out: {', '.join(done)}")
    jobs = [job for job in jobs if job.name not in done]
    poll = Poll(ranks, *saving.interval)
    starting = [job for job in jobs if not job.method.from_scratch]
    for job in starting[:1]:  # all start from one original
        check_knowledge(job.plan, job.method, job.run)
    groups, line = group_by_memory(jobs, ranks)
    memory = ImageMemory(free_bytes(torch.device("cpu")) // (IMAGES * ranks.world))
    statistics: dict[Any, Any] = {}
    teachers = Teachers()
    for job in jobs:
        job.run.notes.append(line)
        job.run.shared, job.run.image_memory = statistics, memory
        job.run.teachers = teachers
    if ranks.main:
        for text in dict.fromkeys(text for job in jobs for text in job.run.notes):
            note(text)
    savers: dict[str, Saver] = {}
    finished: list[str] = []
    failed: dict[str, Exception] = {}
    for group in groups:
        try:
            members = [_member(job, starts[job.name], poll, savers, finished) for job in group]
            failed |= run_together(members, ranks, poll)
        except InputError as error:
            left = ", ".join(job.name for job in jobs if job.name not in finished)
            raise InputError(f"{error}; unfinished: {left}", error.option) from error
        finally:
            defer(False)
    for name, failure in failed.items():
        if name in savers:
            savers[name].fail(failure)
    if failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        line = f"{len(failed)} of {len(jobs)} runs are unfinished: {reasons}"
        ours = [error for error in failed.values() if not isinstance(error, RunFailed)]
        raise RuntimeError(line) if ours else RunFailed(line)


def _member(
    job: NamedPlan, start: Start, poll: Poll, savers: dict[str, Saver], finished: list[str]
) -> Member:
    def begin() -> tuple[Run, Log, Saver]:
        saver = savers[job.name] = start_run(job.plan, job.run, job.out, start, poll)
        model = copy.deepcopy(job.run.model)  # the planned runs share the original
        return dataclasses.replace(job.run, model=model), saver.record.log, saver

    def end(run: Run, seconds: Seconds) -> None:
        finish_run(savers[job.name], job.plan, job.method, run, seconds)
        finished.append(job.name)

    return Member(job.name, job.method, begin, end)


def group_by_memory(jobs: Sequence[NamedPlan], ranks: Ranks) -> tuple[list[list[NamedPlan]], str]:
    """Group the jobs that are trained together, as many as fit in memory; and a line on it.

    The same on every rank: the one with the least free memory decides.
    """
    device = ranks.device
    here = ranks.world if device.type == "cpu" else 1  # ranks that share this memory, at most
    free = torch.tensor([free_bytes(device) // here], dtype=torch.int64)
    if ranks.world > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    groups: list[list[NamedPlan]] = [[]]
    used = 0
    for job in jobs:
        needed = peak_bytes(job, ranks.world)
        if groups[-1] and used + needed > SHARE * free.item():
            groups.append([])
            used = 0
        groups[-1].append(job)
        used += needed
    total = sum(peak_bytes(job, ranks.world) for job in jobs)
    memory = (
        f"weights and optimizers of {len(jobs)} runs take at most {total / 2**30:.2f} GiB "
        f"of {int(free.item()) / 2**30:.2f} GiB free on {device.type}"
    )
    if len(groups) == 1:
        return groups, f"{memory}: all at once"
    at_once = ", then ".join(str(len(group)) for group in groups)
    return groups, f"{memory}, of which half may be used: {at_once}"


def peak_bytes(job: NamedPlan, world: int = 1) -> int:
    """Bytes a rank of `world` keeps between its steps, at most: multiples of its weights.

    To these its method's rows of a share of the forget samples are added. The multiples are of the
    weights and their gradient, the optimizer's moments, a running average where one is asked
    for, and two more for what its method may keep: a teacher, a mask, the weights it started from.
    A run that takes bad steps back holds a copy of all but the gradient. Of a network that is split
    over the ranks it is the multiple of a rank's part, with what a step gathers at once.
    """
    recipe, rows = job.plan.recipe, row_bytes(job.method, job.run, world)
    copies = 4 + (2 if recipe.optimizer == "adamw" else 1) + (1 if recipe.ema else 0)
    if recipe.on_nonfinite == "skip":
        copies += copies - 1  # `Undo` holds all but the gradient again
    if job.run.precision.reduction(world) == "shard":
        part, gathered = count_parts(job.run.model, world)
        return copies * part + gathered + rows
    tensors = [*job.run.model.parameters(), *job.run.model.buffers()]
    return copies * sum(tensor.numel() * tensor.element_size() for tensor in tensors) + rows
