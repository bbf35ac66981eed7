"""What the field's published code does in place of the kernels, written anew from its description.

Several small operations per parameter with a host sync each, sorts for thresholds, all b^3 angles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Masks = Mapping[str, Tensor]  # name -> int64 zeros and ones


def masked_step(
    model: nn.Module, masks: Masks, start: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Mask the gradients and step; then put weights and momentum back, with a host check each.

    Fixed upstream in 2026: decay and momentum no longer move masked weights.
    """
    for name, p in model.named_parameters():
        if p.grad is not None:
            p.grad = p.grad * masks[name]
    optimizer.step()
    for name, p in model.named_parameters():
        mask = masks[name]
        keep = mask.to(p.dtype)
        if int(torch.count_nonzero(mask)) != mask.numel():
            p.data = p.data * keep + start[name] * (1 - keep)
            if "momentum_buffer" in optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] *= keep


def top_masks(scores: Sequence[Tensor], density: float) -> list[Tensor]:
    """Int64 masks of the largest absolute scores of all, by two sorts of everything.

    Fixed: exactly round(density * N) ones, ties in order. One density; the published script sorts
    twenty times for its ten.
    """
    flat = -torch.cat([s.abs().flatten() for s in scores])
    ranks = torch.argsort(torch.argsort(flat, stable=True))
    ones = (ranks < round(density * len(flat))).to(torch.int64)
    parts = ones.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def similarity(student: Tensor, teacher: Tensor, squared: bool = True) -> Tensor:
    """Compare the two Gram matrices, their rows scaled to length one: the norm over b^2.

    Maps are flattened in logical order, which copies channels-last ones.
    """
    grams = [F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher)]
    norm = torch.norm(grams[0] - grams[1])
    return (norm**2 if squared else norm) / len(student) ** 2


def angle(student: Tensor, teacher: Tensor) -> Tensor:
    """All b^3 cosines from all b^2 difference vectors."""
    angles = []
    for features in (student, teacher):
        unit = F.normalize(features[None] - features[:, None], dim=2)
        angles.append(torch.bmm(unit, unit.transpose(1, 2)).view(-1))
    return F.smooth_l1_loss(angles[0], angles[1])
