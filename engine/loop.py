"""The one training loop.

The events of a method, each called by name at its place:

    method.prepare(run)
    for number in range(epochs):
        for phase in method.epoch(run, number):
            for batch in loader.train(phase.reads):
                loss = phase.loss(net, batch);  backward;  gradients averaged over ranks
                method.edit_grads(run)
                optimizer.step()
                method.edit_weights(run)
    method.finish(run)

The step never waits for the host: losses and counts stay on the device and are read once a phase.
Each rank's loss is weighted by its share of the global batch, so an uneven last batch counts each
sample once whatever the number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.compiled import Start, cache_watch
from letheon.engine.distributed import require_equal, sum_over_ranks
from letheon.engine.method import Method, Phase, Run
from letheon.engine.progress import Progress
from letheon.engine.step import Step, assemble
from letheon.loaders.batch import Batch

Log = Callable[..., None]
"""Called as log(kind, **numbers); a no-op on all ranks but the first."""


@dataclass
class Seconds:
    """Wall clock of one run, in seconds; evaluation and saving are nobody's training time."""

    prepare: float = 0.0  # teachers, masks, one-shot edits
    compile: float = 0.0  # forward and backward of the first call of each graph
    train: float = 0.0  # everything else from the first batch of each pass to its last step
    start: Start = ""  # cold: a graph was compiled; warm: all came from the cache; "": no graph
    together: int = 1  # runs, at most, that were fed in one pass; their steps are in `train` too


def run_method(method: Method, run: Run, log: Log = lambda *_, **__: None) -> Seconds:
    """Train `run.model` in place as `method` says.

    Returns:
        The seconds spent; equal weights on every rank are checked by digest after `prepare` and
        at the end.

    Raises:
        FloatingPointError: a phase's mean loss is not finite (on every rank).
        RuntimeError: a retain phase met a forget sample, or the ranks' weights differ.
    """
    seconds = Seconds()
    for one in passes(method, run, seconds, log):
        one.begin()
        for batch in _bar(run, one):
            one.take(batch)
    return seconds


def passes(method: Method, run: Run, seconds: Seconds, log: Log) -> Iterator[Pass]:
    """The run as the passes over the data it asks for; whoever iterates begins and feeds each.

    What lies before, between and after the passes is done here, and `seconds` filled in. Raises as
    `run_method`.
    """
    run.epoch = run.epoch.to(run.ranks.device)
    known = len(run.notes)
    run.decide_dtype()
    run.precision.apply(run.model, run.ranks.device)
    started = time.perf_counter()
    method.prepare(run)
    require_equal(run.ranks, "weights after prepare", weights_digest(run.model))
    seconds.prepare = time.perf_counter() - started
    step = assemble(method, run)
    for note in run.notes[known:]:
        log("note", text=note)
    cache = cache_watch()
    for number in range(run.recipe.epochs):
        run.epoch.fill_(number)
        phases = method.epoch(run, number)
        for later, phase in zip(reversed(range(len(phases))), phases, strict=True):
            one = Pass(run, step, phase, number, later, log)
            yield one
            one.close()
            seconds.train += time.perf_counter() - one.started
            seconds.together = max(seconds.together, one.together)
    step.finish()
    seconds.compile, seconds.start = step.compile_seconds, cache()
    seconds.train -= seconds.compile
    method.finish(run)
    run.model.eval()
    require_equal(run.ranks, "weights at the end", weights_digest(run.model))


class Pass:
    """One phase of one epoch: it is begun, fed all its batches and closed."""

    def __init__(self, run: Run, step: Step, phase: Phase, number: int, later: int, log: Log):
        self.run, self.step, self.phase, self.log = run, step, phase, log
        self.number = number  # of the epoch
        self.later = later  # passes that follow in the same epoch
        self.steps = run.loader.steps(phase.reads)
        self.together = 1  # runs that are fed in this pass

    def begin(self) -> None:
        """Before the first batch."""
        _set_mode(self.run, self.phase)
        # Loss, samples, forget, retain.
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.run.ranks.device)
        self.compiled = self.step.compile_seconds
        self.position, self.rate = 0, 0.0
        self.progress = self._progress()
        self.started = time.perf_counter()

    def take(self, batch: Batch) -> None:
        """One optimisation step on this rank's part of the next global batch."""
        run = self.run
        batch = batch.to(run.ranks.device)
        self.rate = run.recipe.rate(self.number + self.position / self.steps)
        loss = self.step.take(self.phase, batch, self.rate)
        told = run.forget[batch.index].sum()
        self.sums += torch.stack([loss.double() * len(batch.labels), *_counts(batch.labels, told)])
        self.position += 1
        if self.progress is not None:
            self.progress.step(self.position, self.sums, self.rate)

    def _progress(self) -> Progress | None:
        """Lines while the pass runs, where the recipe asks for them: the first rank's samples."""
        if not self.run.recipe.log_every or not self.run.ranks.main:
            return None
        write = partial(self.log, "steps", epoch=self.number, phase=self.phase.name)
        return Progress(self.run.recipe.log_every, write)

    def close(self) -> None:
        """After the last batch: one look at what they added up to."""
        run, phase = self.run, self.phase
        compiling = self.step.compile_seconds - self.compiled
        if self.progress is not None:
            self.progress.read()
        sum_over_ranks([self.sums], run.ranks)
        _average_batch_norm(run, phase)
        total, samples, forget, retain = self.sums.tolist()
        elapsed = time.perf_counter() - self.started - compiling
        mean = total / samples
        self.log(
            "phase",
            epoch=self.number,
            phase=phase.name,
            reads=phase.reads,
            loss=mean if math.isfinite(mean) else str(mean),
            forget_read=int(forget),
            retain_read=int(retain),
            lr=self.rate,
            dtype=run.precision.dtype,
            seconds=elapsed,
            compile_seconds=compiling,
            images_per_second=samples / elapsed,
            **({"together": self.together} if self.together > 1 else {}),
        )
        _audit(phase, int(forget), int(retain))
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"mean loss of phase {phase.name} in epoch {self.number} is {mean}; "
                "lower --lr or --epochs"
            )


def _counts(labels: Tensor, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, forget samples and retain samples of this rank's batch, as float64 scalars."""
    samples = torch.full((), len(labels), dtype=torch.float64, device=told.device)
    return samples, told.double(), samples - told


def _audit(phase: Phase, forget: int, retain: int) -> None:
    """By index, not by the loader's flag: a phase read only what it says it reads."""
    if phase.reads == "retain" and forget:
        raise RuntimeError(f"phase {phase.name} reads retain but met {forget} forget samples")
    if phase.reads == "forget" and retain:
        raise RuntimeError(f"phase {phase.name} reads forget but met {retain} retain samples")


def _bar(run: Run, one: Pass) -> Iterator[Batch]:
    """The pass's batches, with a progress bar on rank 0 of a terminal."""
    yield from tqdm(
        run.loader.train(one.phase.reads, one.number),
        total=one.steps,
        desc=f"epoch {one.number + 1}/{run.recipe.epochs} {one.phase.name}",
        disable=None if run.ranks.main else True,
        leave=False,
    )


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch-norm layers of a model, in its own order."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _frozen(run: Run, phase: Phase) -> bool:
    return phase.batch_norm == "frozen" or run.recipe.batch_norm == "frozen"


def _set_mode(run: Run, phase: Phase) -> None:
    run.model.train()
    if _frozen(run, phase):
        for layer in batch_norms(run.model):
            layer.eval()


def _average_batch_norm(run: Run, phase: Phase) -> None:
    """Make the running statistics equal on all ranks: their mean."""
    if run.ranks.world == 1 or _frozen(run, phase):
        return
    buffers = [
        buffer
        for layer in batch_norms(run.model)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    sum_over_ranks(buffers, run.ranks)
    for buffer in buffers:
        buffer /= dist.get_world_size()
