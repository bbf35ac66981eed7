"""Random numbers that are a function of (seed, stream, epoch, sample index) and of nothing else.

A counter-based generator: the splitmix64 finalizer (Steele, Lea and Flood 2014, "Fast Splittable
Pseudorandom Number Generators") over a key and a counter. The same numbers come on every device,
rank and worker, in any order, so augmentation and drawn labels survive a change of the number of
ranks, a resumed run and a reordered batch.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed 64-bit number
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch has only as an arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finalizer on int64, with wrap-around arithmetic."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def stream_number(stream: str) -> int:
    """The number a stream's name stands for; a compiler may take it as a constant."""
    return zlib.crc32(stream.encode())


def hash_keys(seed: int, stream: str, epoch: int | Tensor, index: Tensor, draws: int) -> Tensor:
    """(B, draws) int64, uniform over all 64-bit values; `stream` keeps independent uses apart."""
    key = torch.full((), seed, dtype=torch.int64, device=index.device)
    key = _mix(key * _GOLDEN + stream_number(stream))
    if not isinstance(epoch, Tensor):  # filled in on the device: a copy would wait for it
        epoch = torch.full((), epoch, dtype=torch.int64, device=index.device)
    key = _mix(key + epoch.to(index.device, torch.int64) * _GOLDEN)
    per_sample = _mix(key + index.to(torch.int64) * _GOLDEN)  # (B,)
    # ~(-k - 1) is k. A compiler that sees k times a constant computes it in int32 on CUDA.
    counter = ~torch.arange(-2, -2 - draws, -1, device=index.device, dtype=torch.int64) * _GOLDEN
    return _mix(per_sample[:, None] + counter)


def uniform(seed: int, stream: str, epoch: int | Tensor, index: Tensor, draws: int) -> Tensor:
    """(B, draws) float64 in [0, 1), one row per sample index."""
    return _shift(hash_keys(seed, stream, epoch, index, draws), 11).to(torch.float64) * 2.0**-53


def normal(seed: int, stream: str, epoch: int | Tensor, index: Tensor, draws: int) -> Tensor:
    """(B, draws) float64 of mean 0 and variance 1, one row per sample index (Box, Muller 1958)."""
    radius, angle = uniform(seed, stream, epoch, index, 2 * draws).chunk(2, dim=1)
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)


def permutation(seed: int, stream: str, epoch: int, n: int) -> Tensor:
    """(n,) int64: the order of n items in this epoch, by stable sort of their keyed numbers."""
    keys = hash_keys(seed, stream, epoch, torch.arange(n), 1)[:, 0]
    return torch.argsort(keys, stable=True)
