"""One optimisation step, and what it needs: the only code that runs for every batch.

Nothing in it waits for the host.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from letheon.engine.compiled import compiled
from letheon.engine.gradient_sync import Alone, Buckets, Flat
from letheon.engine.gradient_sync_trial import quicker, worth_trying
from letheon.engine.method import Loss, Method, Phase, Run
from letheon.loaders.batch import Batch


@dataclass
class Step:
    """Built once a run, after `prepare`."""

    method: Method
    run: Run
    reducer: Alone
    scaler: torch.amp.GradScaler
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)  # by slot
    losses: dict[str, Loss] = field(default_factory=dict)  # by the phase's name
    seen: set[tuple[str, int, int]] = field(default_factory=set)  # phase, rows, total
    compile_seconds: float = 0.0
    averages: list[Tensor] = field(default_factory=list)  # of `averaged`; empty without an EMA

    def take(self, phase: Phase, batch: Batch, rate: float) -> Tensor:
        """Step on this rank's part of one global batch, which is on the device.

        Returns:
            0-dim: the mean loss over this rank's samples, before the step.
        """
        run, device = self.run, self.run.ranks.device
        optimizer = self._optimizer(phase)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for piece, last in pieces(batch, run.recipe.accumulate):
            begun = time.perf_counter()
            with self.reducer.backward(last):
                with run.precision.autocast(device):
                    loss = self._loss(phase)(self.reducer.net, piece)
                weight = len(piece.labels) * run.ranks.world / piece.total
                self.scaler.scale(loss * weight).backward()
            self._note_compile(phase, piece, begun)
            losses.append(loss.detach() * (len(piece.labels) / len(batch.labels)))
        self.reducer.average()
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        self.method.edit_grads(run)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.method.edit_weights(run)
        if self.averages:
            torch._foreach_lerp_(self.averages, self._averaged(), 1 - run.recipe.ema)
        self.reducer.clear()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def finish(self) -> None:
        """After the last step: where an average of the weights was kept, it is what remains."""
        for average, weight in zip(self.averages, self._averaged(), strict=True):
            # Equal numbers keep the weight's own bits: the average turns -0 into 0.
            weight.copy_(torch.where(average == weight, weight, average))

    def _averaged(self) -> list[Tensor]:
        if not self.run.recipe.ema:
            return []
        if self.run.flat is not None:
            return [self.run.flat.weights]
        return [parameter.detach() for parameter in self.run.parameters]

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        if phase.slot not in self.optimizers:
            self.optimizers[phase.slot] = self.method.optimiser(self.run)
        return self.optimizers[phase.slot]

    def _loss(self, phase: Phase) -> Loss:
        """The phase's loss; where the run asks for it, compiled once a name."""
        if phase.name not in self.losses:
            mode = self.run.precision.compile
            self.losses[phase.name] = phase.loss if mode == "off" else compiled(phase.loss, mode)
        return self.losses[phase.name]

    def _note_compile(self, phase: Phase, piece: Batch, begun: float) -> None:
        """Forward and backward of a shape's first call are compiling, not training."""
        shape = (phase.name, len(piece.labels), piece.total)
        if self.run.precision.compile != "off" and shape not in self.seen:
            self.seen.add(shape)
            self.compile_seconds += time.perf_counter() - begun


def assemble(method: Method, run: Run) -> Step:
    """Join the ranks' gradients as the run asks, and prepare the rest of the step."""
    if run.ranks.world > 1 and run.recipe.batch_norm == "sync":
        run.model.net = nn.SyncBatchNorm.convert_sync_batchnorm(run.model.net)
    scaler = torch.amp.GradScaler(run.ranks.device.type, enabled=run.precision.scales_loss)
    reducer = _reducer(method, run)
    run.flat = reducer if isinstance(reducer, Flat) else None
    step = Step(method, run, reducer, scaler)
    step.averages = [weight.clone() for weight in step._averaged()]
    return step


def _reducer(method: Method, run: Run) -> Alone:
    way = run.precision.reduction(run.ranks.world)
    if way == "none" or not run.parameters:
        return Alone(run.model, run.parameters)
    if way == "ddp" and run.precision.reduce == "auto" and worth_trying(method, run):
        way, line = quicker(run)
        run.notes.append(line)
        if run.ranks.main:
            print(line, file=sys.stderr)
    if way == "flat":
        return Flat(run.model, run.parameters, run.ranks, run.precision.wire)
    return Buckets(
        run.model, run.parameters, run.ranks, run.precision.wire, _one_graph(method, run)
    )


def _one_graph(method: Method, run: Run) -> bool:
    """True where every backward pass of the run is the same: one phase, in whole batches."""
    if run.recipe.accumulate > 1 or not run.recipe.epochs:
        return False
    ends = (0, run.recipe.epochs - 1)
    return len({phase.name for number in ends for phase in method.epoch(run, number)}) == 1


def pieces(batch: Batch, count: int) -> Iterator[tuple[Batch, bool]]:
    """The batch in `count` micro-batches, none empty, and whether it is the last.

    Each takes every count-th row, so that the two halves of a ``paired`` batch are in all of them.
    `total` stays that of the whole batch: the losses, weighted by their samples, add up to its own.
    """
    if count == 1:
        yield batch, True
        return
    for first in reversed(range(min(count, len(batch.labels)))):
        rows = slice(first, None, count)
        images, labels, forget, index = (tensor[rows] for tensor in batch[:4])
        yield Batch(images, labels, forget, index, batch.total), first == 0
