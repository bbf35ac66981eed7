"""Boolean masks at one bit a weight: 3.2 MB for 25.6 million weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# Eight bytes of 0 or 1, read as one little-endian 64-bit number, times this: bit i of the top byte
# is byte i. No two of the product's terms fall on the same bit, so nothing carries.
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - (1 << 64)  # bit i of byte i
_CARRY = 0x7F7F7F7F7F7F7F7F  # added to a byte, sets its top bit unless the byte is zero


def pack(mask: Tensor) -> Tensor:
    """Bool of any shape to (ceil(n / 8),) uint8.

    Weight i in row-major order is bit i % 8 of byte i // 8; the bits past the end are zero.
    """
    n = mask.numel()
    padded = mask.new_zeros((n + 7) // 8 * 8)
    padded[:n] = mask.reshape(-1)
    return ((padded.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`: bool of the given shape.

    Raises:
        ValueError: the number of bytes is not that of the shape.
    """
    n = prod(shape)
    if bits.numel() != (n + 7) // 8:
        raise ValueError(
            f"got {bits.numel()} bytes of mask, expected {(n + 7) // 8} for the shape "
            f"{tuple(shape)}; is the mask from another model?"
        )
    spread = (bits.to(torch.int64) * _REPEAT) & _DIAGONAL
    bytes_ = ((spread + _CARRY) >> 7) & _REPEAT
    return bytes_.view(torch.bool)[:n].view(tuple(shape))
