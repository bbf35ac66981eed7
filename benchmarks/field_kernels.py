"""What the field's published code does in place of the kernels, written anew from its description.

The baselines of bench_kernels.py: several small operations per parameter with a host sync each,
sorts for thresholds, all b^3 angles, and every layer's second Gram matrix again for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def field_masked_step(
    params: list[Tensor], masks: list[Tensor], start: list[Tensor], optimiser: torch.optim.Optimizer
) -> None:
    """Gradient masked; then, tensor by tensor, weights and momentum put back, with a host check."""
    for p, m in zip(params, masks, strict=True):
        p.grad = p.grad * m
    optimiser.step()
    for p, m, old in zip(params, masks, start, strict=True):
        keep = m.to(p.dtype)
        if int(torch.count_nonzero(m)) != m.numel():
            p.data = p.data * keep + old * (1 - keep)
            optimiser.state[p]["momentum_buffer"] *= keep


def field_masks(scores: list[Tensor], density: float) -> list[Tensor]:
    """Two sorts of everything, for one density."""
    flat = torch.cat([-s.reshape(-1).abs() for s in scores])
    ranks = torch.argsort(torch.argsort(flat))
    chosen = (ranks < int(len(flat) * density)).to(torch.int64)
    return [
        c.view(s.shape)
        for c, s in zip(chosen.split([s.numel() for s in scores]), scores, strict=True)
    ]


def field_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """All b^3 cosines from all b^2 difference vectors."""
    angles = []
    for features in (student, teacher):
        unit = F.normalize(features[None] - features[:, None], dim=2)
        angles.append(torch.bmm(unit, unit.transpose(1, 2)).view(-1))
    return F.smooth_l1_loss(*angles)


def field_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Flattened in logical order, which copies channels-last maps."""
    grams = []
    for features in (student, teacher):
        rows = features.flatten(1)
        grams.append(F.normalize(rows @ rows.T))
    return (grams[0] - grams[1]).square().sum() / len(student) ** 2


def field_hsic(layers: Sequence[Tensor]) -> list[float]:
    """The unbiased HSIC of every pair: the second Gram matrix made for each, each value read."""
    n = len(layers[0])
    ones = torch.ones(n, 1, device=layers[0].device)
    values = []
    for x in layers:
        k = (x @ x.T).fill_diagonal_(0)
        for y in layers:
            m = (y @ y.T).fill_diagonal_(0)
            value = torch.trace(k @ m)
            value = value + (ones.T @ k @ ones) * (ones.T @ m @ ones) / ((n - 1) * (n - 2))
            value = value - 2 / (n - 2) * (ones.T @ k @ m @ ones)
            values.append(float(value / (n * (n - 3))))
    return values
