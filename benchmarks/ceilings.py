"""What the machine reaches at best, measured beside every step: matrix products and a large copy.

    rows = ceilings("cpu", repeats=10)
    highest(rows, "bf16")  # operations per second

A product counts 2 n^3 operations. A step's share of the ceiling is the operations of its
convolutions and matrix products (`step_operations`) in its time, over what a product reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from harness import Row, interleave, row
from torch.utils.flop_counter import FlopCounterMode

_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ceilings(device: str, repeats: int) -> list[Row]:
    """Rows of Tera-operations/s of square products, and GB/s of a copy (read and written)."""
    side, words = (8192, 1 << 28) if device.startswith("cuda") else (2048, 1 << 25)
    variants: dict[str, Callable[[], object]] = {}
    for name, kind in _KINDS.items():
        left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        variants[name] = lambda left=left, right=right: left @ right
    source = torch.randn(words, device=device)
    target = torch.empty_like(source)
    variants["copy"] = lambda: target.copy_(source)
    times = interleave(variants, repeats, 3, device=device)
    rows = []
    for name in _KINDS:
        rates = [2 * side**3 / (1e9 * ms) for ms in times[name]]
        rows.append(row("ceiling", name, rates, metric="rate of a product", unit="Tops/s",
                        x=f"{side}^3", device=device))  # fmt: skip
    rates = [8 * words / (1e6 * ms) for ms in times["copy"]]
    rows.append(row("ceiling", "copy", rates, metric="rate of a copy", unit="GB/s",
                    x=f"{8 * words / 1e9:.2f} GB", device=device))  # fmt: skip
    return rows


def highest(rows: Sequence[Row], kind: Literal["fp32", "bf16"]) -> float:
    """Operations per second of the product of this number format."""
    return next(1e12 * r.median for r in rows if r.name == "ceiling" and r.variant == kind)


def step_operations(step: Callable[[], object]) -> int:
    """Operations of the convolutions and products of one call: two for a multiplication and sum."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
