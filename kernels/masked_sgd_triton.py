# Triton reads the parameters of a kernel itself and has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The masked step as one Triton kernel: each array is read once and written once.

Bytes for 25.6 million float32 weights with momentum and packed mask: 5 arrays of 102 MB and 3 MB,
0.12 ms at 4.3 TB/s. Unmeasured on a GPU; kept until benchmarks/gpu_suite.py has run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from letheon.kernels.masked_sgd import in_memory_order, masked_sgd_reference_

BLOCK = 1024


@triton.jit
def step_kernel(
    param, grad, buffer, mask, ema, lr, scale, skip, n, momentum, decay, l1, ema_step,
    MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr, MASK: tl.constexpr,
    EMA: tl.constexpr, LR_TENSOR: tl.constexpr, SCALE_TENSOR: tl.constexpr, SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """MASK is "none", "bool" or "bits"; pointers that a flag leaves unused are any tensor."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    write = inside
    if SKIP:
        write = at < tl.where(tl.load(skip) == 0, n, 0)
    rate = lr
    if LR_TENSOR:
        rate = tl.load(lr).to(tl.float32)
    divisor = scale
    if SCALE_TENSOR:
        divisor = tl.load(scale).to(tl.float32)

    p = tl.load(param + at, mask=inside, other=0.0)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) / divisor
    d += decay * p
    d += l1 * tl.where(p > 0, 1.0, tl.where(p < 0, -1.0, 0.0))
    keep = inside
    if MASK == "bool":
        keep = tl.load(mask + at, mask=inside, other=0) != 0
    if MASK == "bits":
        keep = ((tl.load(mask + (at >> 3), mask=inside, other=0).to(tl.int32) >> (at & 7)) & 1) != 0
    if MOMENTUM:
        b = d if FIRST else momentum * tl.load(buffer + at, mask=inside, other=0.0) + d
        tl.store(buffer + at, tl.where(keep, b, 0.0), mask=write)
        if NESTEROV:
            d += momentum * b
        else:
            d = b
    p = tl.where(keep, p - rate * d, p)
    tl.store(param + at, p, mask=write)
    if EMA:
        average = tl.load(ema + at, mask=inside, other=0.0)
        tl.store(ema + at, average + ema_step * (p - average), mask=write)


def masked_sgd_triton_(
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
    """`masked_sgd_` with one launch a tensor.

    Parameters other than float32, and tensors whose arrays lie in different memory orders, take the
    plain form.
    """
    moving = momenta is not None and momentum != 0
    rate = lr if isinstance(lr, Tensor) else float(lr)  # an integer 1 would compile once more
    divisor = grad_scale if isinstance(grad_scale, Tensor) else float(grad_scale)
    decay, penalty = float(weight_decay), float(l1)
    for i, param in enumerate(params):
        buffer = momenta[i] if momenta is not None and moving else None
        average = ema[i] if ema is not None else None
        mask = masks[i] if masks is not None else None
        kind = "none" if mask is None else "bits" if mask.dtype == torch.uint8 else "bool"
        ordered = [t for t in (param, grads[i], buffer, average) if t is not None]
        if mask is not None and kind == "bool":
            ordered.append(mask)
        if param.dtype != torch.float32 or in_memory_order(ordered) is None:
            masked_sgd_reference_(
                [param], [grads[i]], None if buffer is None else [buffer],
                None if mask is None else [mask], lr, momentum, weight_decay, l1, grad_scale,
                first, nesterov, None if average is None else [average], ema_decay, skip,
            )  # fmt: skip
            continue
        if param.numel() == 0:
            continue
        step_kernel[(triton.cdiv(param.numel(), BLOCK),)](
            param, grads[i],
            param if buffer is None else buffer,
            param if mask is None else mask.view(torch.uint8),
            param if average is None else average,
            rate, divisor, param if skip is None else skip,
            param.numel(), float(momentum), decay, penalty, 1.0 - ema_decay,
            MOMENTUM=moving, FIRST=first, NESTEROV=nesterov, MASK=kind, EMA=average is not None,
            LR_TENSOR=isinstance(lr, Tensor), SCALE_TENSOR=isinstance(grad_scale, Tensor),
            SKIP=skip is not None, BLOCK=BLOCK,
        )  # fmt: skip
