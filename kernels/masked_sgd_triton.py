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

from letheon.kernels.masked_sgd_reference import in_memory_order, masked_sgd_reference_

BLOCK = 1024


@triton.jit
def step_kernel(
    param, grad, buffer, mask, lr, skip, n, momentum, decay,
    MOMENTUM: tl.constexpr, BITS: tl.constexpr, LR_TENSOR: tl.constexpr, SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BITS: the mask is packed. Pointers that a flag leaves unused are any tensor."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    write = inside
    if SKIP:
        write = at < tl.where(tl.load(skip) == 0, n, 0)
    rate = lr
    if LR_TENSOR:
        rate = tl.load(lr).to(tl.float32)

    p = tl.load(param + at, mask=inside, other=0.0)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    d += decay * p
    if BITS:
        keep = ((tl.load(mask + (at >> 3), mask=inside, other=0).to(tl.int32) >> (at & 7)) & 1) != 0
    else:
        keep = tl.load(mask + at, mask=inside, other=0) != 0
    if MOMENTUM:
        d += momentum * tl.load(buffer + at, mask=inside, other=0.0)
        tl.store(buffer + at, tl.where(keep, d, 0.0), mask=write)
    tl.store(param + at, tl.where(keep, p - rate * d, p), mask=write)


def masked_sgd_triton_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    skip: Tensor | None = None,
) -> None:
    """`masked_sgd_` with one launch a tensor.

    Parameters other than float32, and tensors whose arrays lie in different memory orders, take the
    plain form.
    """
    rate = lr if isinstance(lr, Tensor) else float(lr)  # an integer 1 would compile once more
    for param, grad, buffer, mask in zip(params, grads, momenta, masks, strict=True):
        packed = mask.dtype == torch.uint8
        arrays = [param, grad, *([buffer] if momentum else []), *([] if packed else [mask])]
        if param.dtype != torch.float32 or in_memory_order(arrays) is None:
            masked_sgd_reference_(
                [param], [grad], [buffer], [mask], lr, momentum, weight_decay, skip
            )
        elif param.numel():
            step_kernel[(triton.cdiv(param.numel(), BLOCK),)](
                param, grad, buffer, mask.view(torch.uint8), rate, param if skip is None else skip,
                param.numel(), float(momentum), float(weight_decay),
                MOMENTUM=momentum != 0, BITS=packed, LR_TENSOR=isinstance(lr, Tensor),
                SKIP=skip is not None, BLOCK=BLOCK,
            )  # fmt: skip
