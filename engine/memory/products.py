"""Products and lengths over all weights, also where a rank has its part of each alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
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


def norms(run: Run, tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each of one tensor per parameter, (parameters,)."""
    sizes = torch.stack(torch._foreach_norm(list(tensors)))
    return sizes if run.shards is None else sum_parts(run, sizes.square()).sqrt()


def joint_norm(run: Run, tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of one tensor per parameter as one vector, 0-dim."""
    sizes = torch.stack(torch._foreach_norm(list(tensors)))
    return sizes.norm() if run.shards is None else sum_parts(run, sizes.square().sum()).sqrt()


def extremes(run: Run, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each of one tensor per parameter, (parameters,) each."""
    if run.shards is None:
        pairs = [tensor.aminmax() for tensor in tensors]
        return torch.stack([low for low, _ in pairs]), torch.stack([high for _, high in pairs])
    # A rank may have no row of a tensor.
    ends = torch.stack([
        torch.stack([part.max(), -part.min()]) if part.numel() else part.new_full((2,), -torch.inf)
        for part in tensors
    ])  # fmt: skip
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[:, 1], ends[:, 0]


def kth_smallest(run: Run, tensors: Sequence[Tensor], rank: int) -> Tensor:
    """Select the `rank`-th smallest (from 1) of all numbers of one tensor per parameter, 0-dim.

    They are at least 0 and of one type, and no NaN. Equal on every rank, and exact: where the ranks
    have parts, they count how many numbers begin with each byte, byte after byte, as in a radix
    selection, for numbers of 0 and more are ordered as their bits are.
    """
    sizes = torch.cat([tensor.flatten() for tensor in tensors])
    if run.shards is None:
        return sizes.kthvalue(rank).values
    bits = sizes.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[sizes.element_size()])
    left = torch.full((), rank, dtype=torch.int64, device=sizes.device)
    prefix = torch.zeros((), dtype=bits.dtype, device=sizes.device)
    among = torch.ones_like(bits, dtype=torch.int64)
    for shift in range(8 * (sizes.element_size() - 1), -1, -8):
        byte = (bits >> shift & 255).long()
        counts = torch.zeros(256, dtype=torch.int64, device=sizes.device)
        below = sum_parts(run, counts.index_add_(0, byte, among)).cumsum(0)
        digit = (below < left).sum()
        left -= torch.where(digit > 0, below[digit - 1], 0)
        among *= byte == digit
        prefix |= digit.to(bits.dtype) << shift
    return prefix.view(sizes.dtype)


def clip_gradients(run: Run, length: float) -> None:
    """Scale the gradients so that together they are at most `length` long, as torch does."""
    if run.shards is None:
        torch.nn.utils.clip_grad_norm_(run.parameters, length)
        return
    grads = [parameter.grad for parameter in run.parameters if parameter.grad is not None]
    share = (length / (joint_norm(run, grads) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, share)
