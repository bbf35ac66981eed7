"""Batch-norm over a run: which layers train in a phase, and equal statistics on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from letheon.engine.distributed import sum_over_ranks
from letheon.engine.method import Phase, Run


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


def average_batch_norm(run: Run, parts: int | None) -> None:
    """Make the running statistics equal on all ranks: their mean.

    `parts` is given where ranks had no sample of some batch: how many this one had a part of. The
    mean is weighted by it, and the layers' counts of batches are the largest.
    """
    if run.ranks.world == 1:
        return
    weight = 1.0
    if parts is not None:
        total = torch.tensor(float(parts), dtype=torch.float64, device=run.ranks.device)
        sum_over_ranks([total], run.ranks)
        weight = parts * run.ranks.world / float(total)
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
