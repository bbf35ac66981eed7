"""One optimisation step, and what it needs: the only code that runs for every batch.

Nothing in it waits for the host.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.compiled import check_numbers, compile_loss
from letheon.engine.distributed import sum_over_ranks
from letheon.engine.gradient_sync import Alone, Buckets, Flat
from letheon.engine.gradient_sync_trial import choose_reduction, worth_trying
from letheon.engine.memory.activations import checkpoint_blocks, restore_blocks
from letheon.engine.method import Loss, Method, PartsLoss, Phase, Run
from letheon.engine.models.batch_norm import Groups, freezes_batch_norm, set_mode
from letheon.engine.numbers.nonfinite import copy_for_undo, find_bad
from letheon.errors import RunFailed
from letheon.loaders.batch import Batch
from letheon.loaders.micro_batches import group_pieces, group_sizes, pieces


@dataclass
class Step:
    """Built once a run, after `prepare`."""

    method: Method
    run: Run
    state: State
    reducer: Alone
    scaler: torch.amp.GradScaler
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)  # by slot
    losses: dict[str, Loss | PartsLoss] = field(default_factory=dict)  # compiled: by phase's name
    numbers: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # that these were made with
    shapes: set[tuple[str, int, int]] = field(default_factory=set)  # compiled: phase, rows, total
    compile_seconds: float = 0.0
    edits_grads: bool = True  # False where the method has no edit of its own
    averages: list[Tensor] = field(default_factory=list)  # empty without an EMA
    idle: frozenset[str] = frozenset()  # phases in which ranks have no sample of some batch
    groups: Groups | None = None  # batch-norm over groups of the batch, where the recipe has them
    blocks: Sequence[nn.Module] = ()  # those whose activations are computed again
    bad: Tensor | None = None  # 0-dim bool: the last step was not finite; None: not looked at

    def take(self, phase: Phase, batch: Batch, rate: float) -> Tensor:
        """Step on this rank's part of one global batch, which is on the device.

        Returns:
            0-dim: the mean loss over this rank's samples, before the step; of a loss in parts,
            their sum.
        """
        optimizer = self.slot_optimizer(phase.slot)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        undo = copy_for_undo(self.run, self.state, optimizer, self.averages)
        backward = self._parts_backward if phase.parts else self._backward
        loss = backward(phase, batch)
        if self.groups is not None and not freezes_batch_norm(self.run, phase):
            self.groups.update(self.run.ranks)
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
            scale = self.scaler._get_scale_async()
            assert scale is not None
            for grads in self.run.grad_parts.values():
                torch._foreach_div_(grads, scale)
        if self.run.recipe.on_nonfinite != "stop":
            self.bad = find_bad(self.run, loss, self.scaler.is_enabled())
        self.method.edit_grads(self.run, self.state, phase)
        if self.edits_grads:
            _align_layouts(self.run.parameters)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.run.grad_parts = {}
        self.method.edit_weights(self.run, self.state, phase)
        if self.averages:
            torch._foreach_lerp_(
                self.averages, _averaged_weights(self.run), 1 - self.run.recipe.ema
            )
        if undo is not None:
            undo.take_back(self.bad)
        self.reducer.clear()
        return loss

    def _backward(self, phase: Phase, batch: Batch) -> Tensor:
        """Leave the gradient, the mean over the ranks, in `.grad`; return the loss."""
        run, losses = self.run, []
        if not len(batch.labels):
            losses.append(_zero_loss(self))
        for piece, last in _micro_batches(self, phase, batch):
            started = time.perf_counter()
            with self.reducer.backward(last):
                with run.precision.autocast(run.ranks.device):
                    loss = self._loss(phase)(self.reducer.net, piece)
                assert isinstance(loss, Tensor)
                weight = len(piece.labels) * run.ranks.world / piece.total
                self.scaler.scale(loss * weight).backward()
            self._note_compile(phase, piece, started)
            losses.append(loss.detach() * (len(piece.labels) / len(batch.labels)))
        self.reducer.average()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _parts_backward(self, phase: Phase, batch: Batch) -> Tensor:
        """The same for a loss in parts: each gradient apart in `run.grad_parts`, their sum in
        `.grad`. Without the reducer, whose hooks would add them up."""  # noqa: D205, D209
        run, parameters, losses = self.run, self.run.parameters, []
        parts = {name: [torch.zeros_like(p) for p in parameters] for name in phase.parts}
        for piece, _ in _micro_batches(self, phase, batch):
            started = time.perf_counter()
            with run.precision.autocast(run.ranks.device):
                values = self._loss(phase)(run.model, piece)
            if not isinstance(values, Mapping) or set(values) != set(phase.parts):
                named = sorted(values) if isinstance(values, Mapping) else "one scalar"
                raise RunFailed(
                    f"got {named} from the loss of phase {phase.name}; expected its parts "
                    f"{', '.join(phase.parts)}; mend the method"
                )
            weight = len(piece.labels) * run.ranks.world / piece.total
            left = len(values)
            for name, value in values.items():
                left -= 1
                scaled = self.scaler.scale(value * weight)
                grads = self.reducer.part_gradients(scaled, keep=left > 0)
                for total, one in zip(parts[name], grads, strict=True):
                    if one is not None:
                        total += one
            self._note_compile(phase, piece, started)
            share = len(piece.labels) / len(batch.labels)
            losses.append(torch.stack([value.detach() for value in values.values()]).sum() * share)
        if not len(batch.labels):
            losses.append(_zero_loss(self))
        if run.shards is None:
            flat = [one for grads in parts.values() for one in grads]
            sum_over_ranks(flat, run.ranks)
            if run.ranks.world > 1:
                torch._foreach_div_(flat, run.ranks.world)
        for parameter, *each in zip(parameters, *parts.values(), strict=True):
            total = each[0].clone() if len(each) == 1 else each[0] + each[1]
            for one in each[2:]:
                total += one
            if parameter.grad is None:
                parameter.grad = total
            else:  # a view of the flat buffer
                parameter.grad.copy_(total)
        run.grad_parts = parts
        return torch.stack(losses).sum()

    def finish(self) -> None:
        """After the last step: where an average of the weights was kept, it is what remains."""
        _restore_layers(self)
        for average, weight in zip(self.averages, _averaged_weights(self.run), strict=True):
            # Equal numbers keep the weight's own bits: the average turns -0 into 0.
            weight.copy_(torch.where(average == weight, weight, average))

    def slot_optimizer(self, slot: str) -> torch.optim.Optimizer:
        """The optimizer of a slot; built when it is first asked for."""
        if slot not in self.optimizers:
            self.optimizers[slot] = self.method.optimizer(self.run, self.state, slot)
        return self.optimizers[slot]

    def _loss(self, phase: Phase) -> Loss | PartsLoss:
        """The phase's loss; where the run asks for it, compiled once a name."""
        if (mode := self.run.precision.compile) == "off":
            return phase.loss
        check_numbers(phase, self.numbers)
        if phase.name not in self.losses:
            self.losses[phase.name] = compile_loss(phase.loss, mode, self.run.model)
        return self.losses[phase.name]

    def _note_compile(self, phase: Phase, piece: Batch, started: float) -> None:
        """Forward and backward of a shape's first call are compiling, not training."""
        shape = (phase.name, len(piece.labels), piece.total)
        if self.run.precision.compile != "off" and shape not in self.shapes:
            self.shapes.add(shape)
            self.compile_seconds += time.perf_counter() - started


def _restore_layers(step: Step) -> None:
    """Give the network's layers their own forward passes back."""
    if step.groups is not None:
        step.groups.remove()
    restore_blocks(step.blocks)


def _micro_batches(step: Step, phase: Phase, batch: Batch) -> Iterator[tuple[Batch, bool]]:
    """The micro-batches, and whether each is the last; of whole groups where there are some."""
    run, count = step.run, step.run.recipe.grad_accum_steps
    halves = 2 if phase.reads == "paired" else 1
    if run.shards is not None:  # every rank passes as often as that with the smallest part
        unit = max(1, run.recipe.batch_norm_group)
        units = -(-batch.total // halves // unit) // run.ranks.world
        count = min(count, units * (1 if run.recipe.batch_norm_group else halves))
    if step.groups is None:
        yield from pieces(batch, count)
        return
    place = (run.ranks.rank, run.ranks.world)
    sizes = group_sizes(batch.total // halves, *place, run.recipe.batch_norm_group)
    try:
        for piece, step.groups.sizes, last in group_pieces(batch, count, sizes, halves):
            yield piece, last
    finally:
        step.groups.sizes = ()


def _averaged_weights(run: Run) -> list[Tensor]:
    if not run.recipe.ema:
        return []
    if run.flat is not None:
        return [run.flat.weights]
    return [parameter.detach() for parameter in run.parameters]


def _zero_loss(step: Step) -> Tensor:
    """Loss of a rank that has no sample of a global batch; the scaler gets its scale by one."""
    return step.scaler.scale(torch.zeros((), device=step.run.ranks.device))


def rehearse(step: Step, phase: Phase, batch: Batch) -> None:
    """Forward and backward without a step; running statistics and random numbers move."""
    set_mode(step.run, phase)
    step._backward(phase, batch)
    if step.groups is not None:
        step.groups.update(step.run.ranks)
    step.reducer.clear()


def assemble(method: Method, run: Run, state: State) -> Step:
    """Join the ranks' gradients as the run asks, and prepare the rest of the step."""
    if run.ranks.world > 1 and run.recipe.batch_norm == "sync":
        run.model.net = nn.SyncBatchNorm.convert_sync_batchnorm(run.model.net)
    scaler = torch.amp.GradScaler(run.ranks.device.type, enabled=run.precision.scales_loss)
    reducer = _reducer(method, run, state)
    run.flat = reducer if isinstance(reducer, Flat) else None
    step = Step(method, run, state, reducer, scaler)
    step.edits_grads = type(method).edit_grads is not Method.edit_grads
    step.averages = [weight.clone() for weight in _averaged_weights(run)]
    step.idle = check_sync(method, run, state)
    if run.recipe.batch_norm_group:
        step.groups = Groups(run.model, run.ranks.device)
    if run.recipe.activation_checkpoint:
        step.blocks = checkpoint_blocks(run.model)
    return step


def check_sync(method: Method, run: Run, state: State) -> frozenset[str]:
    """Return `idle_phases`; refuses what every rank takes part in where there are some.

    Raises:
        RunFailed: a batch of fewer samples than ranks, in which every rank takes part.
    """
    idle = idle_phases(method, run, state)
    if idle and run.splits:
        raise RunFailed(
            f"got a batch of fewer samples than {run.ranks.world} ranks in {min(idle)} with reduce "
            "shard, in which every rank holds a part of the network; use a larger batch, or start "
            "fewer ranks"
        )
    if idle and run.recipe.batch_norm == "sync":
        raise RunFailed(
            f"got a batch of fewer samples than {run.ranks.world} ranks in {min(idle)} with "
            "batch-norm sync, in which every rank takes part; use batch-norm local or frozen, or "
            "start fewer ranks"
        )
    return idle


def idle_phases(method: Method, run: Run, state: State) -> frozenset[str]:
    """Names of the phases with a global batch that has no part for some rank."""
    if run.ranks.world == 1:
        return frozenset()
    streams = {
        (run.stream(phase), phase.source): phase.name
        for epoch in range(run.recipe.epochs)
        for phase in _all(method, run, state, epoch)
    }
    others = any(source != "train" for _, source in streams)
    sizes = {name: len(images) for name, images in method.sources(run).items()} if others else {}
    return frozenset(
        name
        for (stream, source), name in streams.items()
        if run.fewest_parts(stream, sizes.get(source)) < run.ranks.world
    )


def _align_layouts(parameters: list[nn.Parameter]) -> None:
    """Give gradients the memory layout of their weights: fused optimizers take it for granted."""
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(grad)


def _reducer(method: Method, run: Run, state: State) -> Alone:
    if run.shards is not None:
        return run.shards
    way = run.precision.reduction(run.ranks.world)
    if way == "none" or not run.parameters:
        return Alone(run.model, run.parameters)
    epochs = run.recipe.epochs
    phases = _all(method, run, state, 0) if epochs else []
    if way == "ddp" and run.precision.tune_step and run.precision.reduce == "auto":
        steps = sum(run.loader.steps(phase.stream) for phase in phases) * epochs
        if worth_trying(steps):
            way, line = choose_reduction(run)
            run.notes.append(line)
            if run.ranks.main:
                print(line, file=sys.stderr)
    static = _one_graph(method, run, state)
    # Buckets wait for parameters no phase uses, and for ranks that have no sample in a batch.
    waits = hasattr(run.model, "extra") or idle_phases(method, run, state)
    unused = [] if way == "flat" or static else _unused_parameters(run)
    if way == "flat" or waits or unused:
        flat = Flat(run.model, run.parameters, run.ranks, run.precision.wire)
        for parameter in unused:
            parameter.grad = None  # as on one rank: no decay moves it
        return flat
    return Buckets(run.model, run.parameters, run.ranks, run.precision.wire, static)


def _unused_parameters(run: Run) -> list[nn.Parameter]:
    """Parameters that the network's logits do not depend on, by those of one blank image."""
    model, parameters = run.model, run.parameters
    was_training, size = model.training, model.preset.size
    model.eval()
    image = torch.zeros(1, 3, size, size, device=parameters[0].device, dtype=parameters[0].dtype)
    grads = torch.autograd.grad(model(image).logits.sum(), parameters, allow_unused=True)
    model.train(was_training)
    return [one for one, grad in zip(parameters, grads, strict=True) if grad is None]


def _all(method: Method, run: Run, state: State, epoch: int) -> list[Phase]:
    """The phases of an epoch, with those beside them."""
    phases = method.phases(run, state, epoch)
    return [one for phase in phases for one in (phase, phase.beside) if one is not None]


def _one_graph(method: Method, run: Run, state: State) -> bool:
    """True where every backward pass of the run is the same: one phase, in whole batches."""
    if run.recipe.grad_accum_steps > 1 or not run.recipe.epochs:
        return False
    ends = (0, run.recipe.epochs - 1)
    return len({phase.name for epoch in ends for phase in _all(method, run, state, epoch)}) == 1
