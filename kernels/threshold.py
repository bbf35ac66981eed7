"""The largest scores over all tensors of a network, by exact global rank.

Absolute values are compared through their float32 bit patterns, which order as integers. Two
histogram passes (the upper 15 bits, then the lower 16 within the few bins that matter) give the
exact threshold for all densities at once: no sort, no index of all weights, two reads of the
scores. Timed on two CPU cores in benchmarks/results; the Triton pass is unmeasured on a GPU and
kept until benchmarks/gpu_suite.py has run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from letheon.kernels.backend import takes_triton
from letheon.kernels.bits import pack, unpack

__all__ = ["Cut", "cuts", "masks_of_cut", "pack", "top_masks", "top_masks_reference", "unpack"]

_LOW = 16  # bits of the second pass
_BINS = 1 << 15  # of the first: sign (always 0), 8 bits of exponent, 7 of mantissa
_INFINITY = 0x7F800000
_CHUNK = 1 << 18  # scores at once on the CPU: the temporaries stay in cache

Count = Callable[[Tensor, Tensor, "Tensor | None"], None]
"""(scores, histogram, slots): add one tensor's scores to the histogram of either pass."""


@dataclass(frozen=True)
class Cut:
    """A threshold on float32 bit patterns of absolute scores.

    In are the scores above `bits`, and of those equal to it the first `ties`, in order of tensor
    and row-major position.
    """

    bits: int
    ties: int


def top_masks(scores: Sequence[Tensor], densities: Sequence[float]) -> list[list[Tensor]]:
    """For each density, one bool mask per tensor, true for the largest absolute scores of all.

    Exactly round(density * N) are true, N being the number of scores in all tensors. Among equal
    scores the first in order of tensor and row-major position come first, so ranks that hold the
    same scores agree. float64 scores are rounded to float32 first.

    Args:
        scores: any shapes, float types; on one device. Read only.
        densities: shares in [0, 1].

    Returns:
        masks[density][tensor], with the shape and strides of its scores. The host waits.

    Raises:
        ValueError: a score is NaN (the tensor's position is named), or a density is out of range.
    """
    return _masks(scores, cuts(scores, densities))


def top_masks_reference(scores: Sequence[Tensor], densities: Sequence[float]) -> list[list[Tensor]]:
    """`top_masks` in plain PyTorch on every device."""
    return _masks(scores, _cuts(scores, densities, _count))


def cuts(scores: Sequence[Tensor], densities: Sequence[float]) -> list[Cut]:
    """The thresholds alone, for masks made (and packed) one density at a time with `masks_of_cut`.

    Arguments and errors as in `top_masks`.
    """
    if scores and takes_triton(scores[0]):
        from letheon.kernels.threshold_triton import count

        return _cuts(scores, densities, count)
    return _cuts(scores, densities, _count)


def masks_of_cut(scores: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    """One bool mask per tensor."""
    return _masks(scores, [cut])[0]


def _cuts(scores: Sequence[Tensor], densities: Sequence[float], count: Count) -> list[Cut]:
    for density in densities:
        if not 0 <= density <= 1:
            raise ValueError(f"got density {density}, expected a share from 0 to 1")
    total = sum(t.numel() for t in scores)
    ranks = [round(density * total) for density in densities]
    if total == 0:
        return [Cut(_INFINITY, 0) for _ in ranks]
    device = scores[0].device
    coarse = torch.zeros(_BINS, dtype=torch.int64, device=device)
    for tensor in scores:
        count(tensor, coarse, None)
    coarse = coarse.cpu()
    if coarse[_INFINITY >> _LOW :].any():
        _refuse_nan(scores)
    found = [_bin_of_rank(coarse, rank) for rank in ranks]
    bins = sorted({b for b, _ in found})
    slots = torch.full((_BINS,), len(bins), dtype=torch.int32)
    slots[bins] = torch.arange(len(bins), dtype=torch.int32)
    fine = torch.zeros(len(bins) + 1, 1 << _LOW, dtype=torch.int64, device=device)
    for tensor in scores:
        count(tensor, fine, slots.to(device))
    fine = fine.cpu()
    result = []
    for rank, (upper, rest) in zip(ranks, found, strict=True):
        here = fine[bins.index(upper)]
        lower, ties = _bin_of_rank(here, rest)
        bits = upper << _LOW | lower
        if rank == 0:
            result.append(Cut(_INFINITY, 0))
        elif ties == int(here[lower]):
            result.append(Cut(bits - 1, 0))
        else:
            result.append(Cut(bits, ties))
    return result


def _bin_of_rank(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the score of this rank from the top, and its rank within the bin."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, max(rank, 1)))
    above = int(from_top[position - 1]) if position else 0
    return histogram.numel() - 1 - position, rank - above


def _patterns(scores: Tensor) -> Tensor:
    """int32, ordered as the absolute values are."""
    return scores.detach().abs().float().view(torch.int32)


def _parts(flat: Tensor) -> tuple[Tensor, ...]:
    return flat.split(_CHUNK) if flat.device.type == "cpu" else (flat,)


def _count(scores: Tensor, histogram: Tensor, slots: Tensor | None) -> None:
    whole = scores.detach()
    if not whole.is_contiguous() and whole.is_contiguous(memory_format=torch.channels_last):
        whole = whole.permute(0, 2, 3, 1)  # a histogram does not mind the order
    for part in _parts(whole.reshape(-1)):
        patterns = _patterns(part)
        keys = patterns >> _LOW
        if slots is not None:
            keys = slots.index_select(0, keys) << _LOW | patterns & ((1 << _LOW) - 1)
        histogram.view(-1).add_(torch.bincount(keys, minlength=histogram.numel()))


def _masks(scores: Sequence[Tensor], wanted: Sequence[Cut]) -> list[list[Tensor]]:
    masks: list[list[Tensor]] = [[] for _ in wanted]
    left = [cut.ties for cut in wanted]
    for tensor in scores:
        patterns = _patterns(tensor)
        for i, cut in enumerate(wanted):
            mask = patterns > cut.bits
            if left[i]:
                ties, taken = _first_true(patterns == cut.bits, left[i])
                mask |= ties
                left[i] -= taken
            masks[i].append(mask)
    return masks


def _first_true(equal: Tensor, quota: int) -> tuple[Tensor, int]:
    """Only the first `quota` of the true ones, in row-major order, and how many they are."""
    count = int(equal.count_nonzero())
    if count <= quota:
        return equal, count
    flat, left = equal.flatten(), quota
    for part in _parts(flat):
        here = int(part.count_nonzero())
        if here > left:
            part &= part.cumsum(0, dtype=torch.int32) <= left
        left -= min(here, left)
    return flat.view(equal.shape), quota


def _refuse_nan(scores: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(scores):
        broken = int(tensor.isnan().sum())
        if broken:
            raise ValueError(
                f"got {broken} NaN among the {tensor.numel()} scores of tensor {i}, expected "
                "numbers; lower the learning rate or the loss scale of the pass that made them"
            )
