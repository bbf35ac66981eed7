# Triton reads the parameters of a kernel itself and has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The histogram passes of the exact threshold in Triton: one launch and one read a tensor.

Unmeasured on a GPU; kept until benchmarks/gpu_suite.py has run. Atomic additions on one bin run in
turn, so scores that are nearly all equal (zero) are its slow case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def count_kernel(
    scores, slots, histogram, n, last_slot, FINE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Coarse: count the upper 15 bits. Fine: count the lower 16 of scores whose bin has a slot."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = at < n
    values = tl.load(scores + at, mask=counted, other=0.0).to(tl.float32)
    patterns = tl.abs(values).to(tl.int32, bitcast=True)
    keys = patterns >> 16
    if FINE:
        slot = tl.load(slots + keys, mask=counted, other=0)
        counted = counted & (slot < last_slot)
        keys = (slot << 16) | (patterns & 0xFFFF)
    tl.atomic_add(histogram + keys, tl.full((BLOCK,), 1, tl.int64), mask=counted)


def count(scores: Tensor, histogram: Tensor, slots: Tensor | None) -> None:
    """Add one tensor's scores to the (32768,) or (slots + 1, 65536) int64 histogram.

    The last row of the second, scores that matter to no density, is left at zero.
    """
    flat = scores.detach()
    if not flat.is_contiguous() and flat.is_contiguous(memory_format=torch.channels_last):
        flat = flat.permute(0, 2, 3, 1)
    flat = flat.reshape(-1)
    if flat.numel() == 0:
        return
    count_kernel[(triton.cdiv(flat.numel(), BLOCK),)](
        flat, histogram if slots is None else slots, histogram, flat.numel(),
        0 if slots is None else histogram.shape[0] - 1, FINE=slots is not None, BLOCK=BLOCK,
    )  # fmt: skip
