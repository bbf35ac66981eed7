"""Products and lengths over all weights, also where a rank has its part of each alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from letheon.engine.distributed import sum_over_ranks
from letheon.engine.method import Run


def sum_parts(run: Run, values: Tensor) -> Tensor:
    """Add up over the ranks what each has summed over its part of the weights.

    Where the network is whole on each rank, `values` (of any shape) are returned as they are.
    Equal on every rank; nothing waits for the host.
    """
    if run.shards is not None:
        values = values.clone()
        sum_over_ranks([values], run.ranks)
    return values


def joint_norm(run: Run, tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of one tensor per parameter as one vector, 0-dim."""
    sizes = torch.stack(torch._foreach_norm(list(tensors)))
    return sizes.norm() if run.shards is None else sum_parts(run, sizes.square().sum()).sqrt()


def clip_gradients(run: Run, length: float) -> None:
    """Scale the gradients so that together they are at most `length` long, as torch does."""
    if run.shards is None:
        torch.nn.utils.clip_grad_norm_(run.parameters, length)
        return
    grads = [parameter.grad for parameter in run.parameters if parameter.grad is not None]
    share = (length / (joint_norm(run, grads) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, share)
