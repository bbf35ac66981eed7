"""Batch-norm over a run: which layers train in a phase, and equal statistics on every rank."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.distributed import Ranks, sum_over_ranks
from letheon.engine.method import Phase, Run
from letheon.errors import InputError, RunFailed


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch-norm layers of a model, in its own order."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def freezes_batch_norm(run: Run, phase: Phase) -> bool:
    """Whether running statistics are used and kept in a phase."""
    return phase.batch_norm == "frozen" or run.recipe.batch_norm == "frozen"


def moves(layer: nn.Module) -> bool:
    """False for a layer whose weights a method has frozen: its running statistics rest, too."""
    moving = [parameter.requires_grad for parameter in layer.parameters()]
    return any(moving) or not moving


def set_mode(run: Run, phase: Phase) -> None:
    """Put the model into training mode as the phase wants it."""
    run.model.train()
    for layer in batch_norms(run.model):
        if freezes_batch_norm(run, phase) or not moves(layer):
            layer.eval()


class Groups:
    """Batch-norm over groups of the global batch, each of them normalized by its own statistics.

    Ghost batches (Hoffer, Hubara and Soudry 2017, "Train longer, generalize better", algorithm 1):
    the outputs do not depend on how many ranks and micro-batches the groups are dealt out to. The
    running statistics move once a step, by the mean over all groups of all ranks, as those of local
    batch-norm do on as many ranks as there are groups; the paper's move once a group.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        """Give the layers of `model` another forward pass; `remove` takes it back.

        Raises:
            InputError: as `check_kinds`.
        """
        check_kinds(model)
        self.layers = batch_norms(model)
        self.sizes: tuple[int, ...] = ()
        """Rows of each group of the micro-batch that is computed; (): batch-norm is torch's own."""
        widths = [2 * layer.num_features + 1 for layer in self.layers]  # mean, variance, groups
        self._sums = torch.zeros(sum(widths), device=device)
        self._parts = self._sums.split(widths) if widths else ()
        self._running = [layer.running_mean for layer in self.layers]
        for number, layer in enumerate(self.layers):
            setattr(layer, "forward", partial(self._forward, number))  # noqa: B010

    def _forward(self, number: int, images: Tensor) -> Tensor:
        """(R, C, ...) normalized group by group, where R is a multiple of the micro-batch's rows.

        Rows beyond these (a forget half, a second view) are further images of the same groups.
        """
        layer, sums = self.layers[number], self._parts[number]
        if not layer.training or not self.sizes:
            return type(layer).forward(layer, images)
        rows = sum(self.sizes)
        if images.shape[0] % rows:
            raise RunFailed(
                f"got {images.shape[0]} images in a forward pass of {rows}; expected a multiple, "
                "since batch-norm groups are of whole batches; leave the groups out"
            )
        stats = torch.zeros(len(self.sizes), 2, layer.num_features, device=images.device)
        if images.shape[0] == rows:
            # Not as below: of one row with a stride of its own torch 2.14's gradient is wrong.
            parts = list(images.split(self.sizes))
        else:
            views = images.unflatten(0, (-1, rows))
            parts = [part.flatten(0, 1) for part in views.split(self.sizes, 1)]
        normal = [
            F.batch_norm(part, mean, var, layer.weight, layer.bias, True, 1.0, layer.eps)
            for part, (mean, var) in zip(parts, stats, strict=True)
        ]
        if layer.running_mean is self._running[number]:  # else computed again, and counted before
            sums[:-1] += stats.sum(0).flatten()
            sums[-1] += len(self.sizes)
        if images.shape[0] == rows:
            return torch.cat(normal)
        several = images.shape[0] // rows
        return torch.cat([one.unflatten(0, (several, -1)) for one in normal], 1).flatten(0, 1)

    @torch.no_grad()
    def update(self, ranks: Ranks) -> None:
        """Move the running statistics by the groups of a step, those of all ranks alike."""
        sum_over_ranks([self._sums], ranks)
        for layer, sums in zip(self.layers, self._parts, strict=True):
            count = sums[-1]  # groups; 0 where the layer rested
            moved = count.clamp(max=1)
            assert layer.running_mean is not None and layer.running_var is not None
            assert layer.momentum is not None and layer.num_batches_tracked is not None
            mean, var = (sums[:-1] / count.clamp(min=1)).chunk(2)
            layer.running_mean.lerp_(mean, layer.momentum * moved)
            layer.running_var.lerp_(var, layer.momentum * moved)
            layer.num_batches_tracked += moved.long()
        self._sums.zero_()

    def remove(self) -> None:
        """Make the layers torch's own again."""
        for layer in self.layers:
            del layer.forward


def check_kinds(model: nn.Module) -> None:
    """Refuse batch-norm layers that cannot normalize by groups.

    Raises:
        InputError: one that computes in its own way, or keeps no moving average.
    """
    for layer in batch_norms(model):
        own = type(layer).forward is not nn.modules.batchnorm._BatchNorm.forward
        if own or layer.momentum is None or layer.running_mean is None:
            raise InputError(
                f"got batch-norm groups with a network of {type(layer).__name__} layers; expected "
                "torch's BatchNorm with a momentum; leave the groups out",
                option="batch_norm_group",
            )


def average_batch_norm(run: Run, parts: int | None) -> None:
    """Make the running statistics equal on all ranks: their mean.

    `parts` is given where ranks had no sample of some batch: how many this one had a part of. The
    mean is weighted by it, and the layers' counts of batches are the largest.
    """
    if run.ranks.world == 1 or run.recipe.batch_norm_group:  # groups: equal after every step
        return
    weight = 1.0
    if parts is not None:
        total = torch.tensor(float(parts), dtype=torch.float64, device=run.ranks.device)
        sum_over_ranks([total], run.ranks)
        weight = parts * run.ranks.world / float(total) if total else 1.0
    if parts is not None or run.recipe.grad_accum_steps > 1:  # a small part has fewer pieces
        for layer in batch_norms(run.model):
            if layer.num_batches_tracked is not None:
                dist.all_reduce(layer.num_batches_tracked, dist.ReduceOp.MAX)
    buffers = [
        buffer
        for layer in batch_norms(run.model)
        if moves(layer)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    if buffers and weight != 1.0:
        torch._foreach_mul_(buffers, weight)
    sum_over_ranks(buffers, run.ranks)
    for buffer in buffers:
        buffer /= dist.get_world_size()
