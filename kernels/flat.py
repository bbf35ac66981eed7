"""A model's weights as one buffer, so that a step over all of them is one pass and one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from letheon.kernels.threshold import pack

_ALIGN = 64  # weights: 256 bytes of float32, and whole bytes of mask


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the buffer; strides are kept, so channels-last stays so."""

    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """The layout of these tensors, each of which must fill its memory without holes.

        Raises:
            ValueError: a tensor is a strided view, such as a slice of another.
        """
        offsets, length = [], 0
        for i, t in enumerate(tensors):
            if t.numel() and 1 + sum(
                (n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)
            ) != t.numel():  # fmt: skip
                raise ValueError(
                    f"got tensor {i} with shape {tuple(t.shape)} and strides {t.stride()}, "
                    "expected one without holes; pass a contiguous copy"
                )
            offsets.append(length)
            length += -(-t.numel() // _ALIGN) * _ALIGN
        shapes = tuple(t.shape for t in tensors)
        return cls(shapes, tuple(t.stride() for t in tensors), tuple(offsets), length)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors as views of a (length,) buffer."""
        return [
            flat.as_strided(shape, stride, flat.storage_offset() + offset)
            for shape, stride, offset in zip(self.shapes, self.strides, self.offsets, strict=True)
        ]

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """A new (length,) buffer with the tensors' values; the gaps between them are zero."""
        flat = torch.zeros(self.length, dtype=tensors[0].dtype, device=tensors[0].device)
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            view.copy_(tensor.detach())
        return flat

    def bits(self, masks: Sequence[Tensor]) -> Tensor:
        """(length / 8,) uint8: bool masks in the order of the buffer, for `masked_sgd_`."""
        return pack(self.gather(masks))


def adopt_(params: Sequence[Tensor], layout: Layout) -> Tensor:
    """Move the parameters' values to one new buffer and make the parameters views of it.

    The same for gradients: `for p, v in zip(params, layout.views(buffer)): p.grad = v`. Do this
    after the model is on its device and in its memory format, before it is compiled or wrapped.
    """
    flat = layout.gather(params)
    for param, view in zip(params, layout.views(flat), strict=True):
        param.data = view
    return flat
