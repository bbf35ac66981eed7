"""One SGD step on weights of which some must not move.

The gradient is unscaled; weight decay and the subgradient of an l1 penalty are added to it; then
comes momentum as in `torch.optim.SGD` with dampening 0. The mask acts on the result of all that,
so a masked weight keeps its bits whatever the decay, the momentum or a gradient that is not
finite. (SalUn, Fan et al. 2024, defines the unlearned weights so: masked ones are the original's.
Code that masks only the gradient lets decay and momentum move them.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from letheon.kernels.backend import takes_triton
from letheon.kernels.bits import unpack

_CHUNK = 1 << 17  # weights at once on the CPU, a multiple of 8: few calls, and still in cache
_SAME_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    masks: Sequence[Tensor] | None,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    first: bool = False,
    nesterov: bool = False,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.999,
    skip: Tensor | None = None,
) -> None:
    """Update the parameters and momentum buffers in place; reads each array once.

    The lists may hold one flat buffer each (`kernels.flat`), which is one kernel launch on CUDA and
    the fastest form everywhere, or the tensors of a model, one launch a tensor. No host sync.

    Args:
        params: float tensors.
        grads: of the same shapes; another float type is converted.
        momenta: buffers like the parameters; None (or momentum 0) for plain SGD.
        masks: true where a weight may move: bool of the parameter's shape, or for a
            one-dimensional parameter also the uint8 bits of `kernels.bits.pack` (less memory; on
            the CPU bool is a quarter faster). The momentum of a masked weight becomes zero.
        lr: a number, or a 0-dim tensor on the parameters' device.
        momentum: as in torch.optim.SGD.
        weight_decay: times the weight, added to the gradient.
        l1: times the sign of the weight (0 at 0), added to the gradient: the subgradient of
            l1 * sum |w|, as in l1-sparse unlearning (Jia et al. 2023).
        grad_scale: gradients are divided by it, a number or a 0-dim tensor.
        first: the buffers hold nothing yet and are set to the gradient, as in PyTorch.
        nesterov: Nesterov momentum as in PyTorch.
        ema: averages of the parameters, moved by (1 - ema_decay) of the way after the step.
        ema_decay: the share of the average that stays.
        skip: 0-dim; where it is not zero the step leaves everything as it was (a loss scale that
            overflowed).
    """
    if params and takes_triton(params[0]):
        from letheon.kernels.masked_sgd_triton import masked_sgd_triton_ as form
    else:
        form = masked_sgd_reference_
    form(
        params, grads, momenta, masks, lr, momentum, weight_decay, l1, grad_scale, first,
        nesterov, ema, ema_decay, skip,
    )  # fmt: skip


def masked_sgd_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    masks: Sequence[Tensor] | None,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    first: bool = False,
    nesterov: bool = False,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.999,
    skip: Tensor | None = None,
) -> None:
    """`masked_sgd_` in plain PyTorch: on the CPU in pieces that stay in cache."""
    for i, whole in enumerate(params):
        arrays = [whole, grads[i]]
        arrays += [momenta[i]] if momenta is not None and momentum else []
        arrays += [ema[i]] if ema is not None else []
        for (param, grad, *rest), keep in _pieces(arrays, None if masks is None else masks[i]):
            buffer = rest[0] if momenta is not None and momentum else None
            before = [t.clone() for t in (param, *rest)] if skip is not None else []
            d = grad.to(param.dtype)
            if isinstance(grad_scale, Tensor) or grad_scale != 1:
                d = d / grad_scale
            if weight_decay:
                d = d.add(param, alpha=weight_decay)
            if l1:
                d = d.add(param.sign(), alpha=l1)
            if keep is not None and (buffer is None or nesterov):
                d = d.clone()
                _zero_outside(d, keep)
            if buffer is not None:
                buffer.copy_(d) if first else buffer.mul_(momentum).add_(d)
                if keep is not None:
                    _zero_outside(buffer, keep)
                d = d.add(buffer, alpha=momentum) if nesterov else buffer
            if isinstance(lr, Tensor):
                param.sub_(d * lr)
            else:
                param.add_(d, alpha=-lr)
            if ema is not None:
                rest[-1].lerp_(param, 1 - ema_decay)
            if skip is not None:
                for now, old in zip((param, *rest), before, strict=True):
                    now.copy_(torch.where(skip != 0, old, now))


def _zero_outside(values: Tensor, keep: Tensor) -> None:
    """Set to +0 where `keep` is false, by bits: a product would let NaN, inf and -0 through."""
    whole = _SAME_WIDTH[values.element_size()]
    values.view(whole).bitwise_and_(keep.view(torch.int8).to(whole).neg_())


def _pieces(
    arrays: list[Tensor], mask: Tensor | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
    """Views of the arrays and of the bool mask over the same weights, in memory order."""
    packed = mask is not None and mask.dtype == torch.uint8
    together = arrays if mask is None or packed else [*arrays, mask]
    flat = in_memory_order(together)
    if flat is None:
        assert not packed
        yield tuple(arrays), mask
        return
    n = flat[0].numel()
    step = _CHUNK if flat[0].device.type == "cpu" else max(n, 1)
    for start in range(0, n, step):
        length = min(step, n - start)
        parts = [t.narrow(0, start, length) for t in flat]
        keep: Tensor | None = None
        if packed and mask is not None:
            keep = unpack(mask[start // 8 : (start + length + 7) // 8], (length,))
        elif mask is not None:
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
