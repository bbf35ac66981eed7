"""The masked SGD step in plain PyTorch: what the Triton kernel must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from letheon.kernels.threshold import unpack

_CHUNK = 1 << 17  # weights at once on the CPU, a multiple of 8: few calls, and still in cache
_SAME_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked_sgd_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    skip: Tensor | None = None,
) -> None:
    """`masked_sgd_` in plain PyTorch: on the CPU in pieces that stay in cache."""
    for whole, gradient, buffers, mask in zip(params, grads, momenta, masks, strict=True):
        arrays = [whole, gradient, *([buffers] if momentum else [])]
        for (param, grad, *rest), keep in _pieces(arrays, mask):
            before = [t.clone() for t in (param, *rest)] if skip is not None else []
            d = grad.to(param.dtype)
            if weight_decay:
                d = d.add(param, alpha=weight_decay)
            if momentum:
                [buffer] = rest
                buffer.mul_(momentum).add_(d)
                _zero_outside(buffer, keep)
                d = buffer
            else:
                d = d.clone()
                _zero_outside(d, keep)
            if isinstance(lr, Tensor):
                param.sub_(d * lr)
            else:
                param.add_(d, alpha=-lr)
            if skip is not None:
                for now, old in zip((param, *rest), before, strict=True):
                    now.copy_(torch.where(skip != 0, old, now))


def _zero_outside(values: Tensor, keep: Tensor) -> None:
    """Set to +0 where `keep` is false, by bits: a product would let NaN, inf and -0 through."""
    whole = _SAME_WIDTH[values.element_size()]
    values.view(whole).bitwise_and_(keep.to(whole).neg_())


def _pieces(arrays: Sequence[Tensor], mask: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Views of the arrays and of the bool mask over the same weights, in memory order."""
    packed = mask.dtype == torch.uint8
    flat = in_memory_order(arrays if packed else [*arrays, mask])
    if flat is None:
        assert not packed
        yield tuple(arrays), mask
        return
    n = flat[0].numel()
    step = _CHUNK if flat[0].device.type == "cpu" else max(n, 1)
    for start in range(0, n, step):
        length = min(step, n - start)
        parts = [t.narrow(0, start, length) for t in flat]
        if packed:
            keep = unpack(mask[start // 8 : (start + length + 7) // 8], (length,))
        else:
            keep = parts.pop()
        yield tuple(parts), keep


def in_memory_order(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """One-dimensional views in which equal positions are equal weights; None if layouts differ."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    last = torch.channels_last
    if all(t.dim() == 4 and t.is_contiguous(memory_format=last) for t in tensors):
        return [t.permute(0, 2, 3, 1).view(-1) for t in tensors]
    return None
