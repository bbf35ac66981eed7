"""Convolutions of small images on a CPU, computed as a few matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from letheon.kernels.small_conv import output_size, small_conv2d

MOST_POSITIONS = 9
"""Pixels of the output, at most. Above, the library's kernels do as well or better."""
LEAST_WEIGHTS = 1 << 17
"""Smaller weights stay in the processor's cache while the images pass, and the library is quick."""
LEAST_IMAGES = 8
"""In the batch; below, a product has too few rows to be worth its call."""

_FORMATS = (torch.float32, torch.bfloat16)


class SmallConv2d(nn.Conv2d):
    """nn.Conv2d, equal to rounding, that computes small images as `kernels/small_conv.py` does.

    It looks at each batch; what is not small, on another device or inside a compiled graph is left
    to torch. Keys, state and `forward` are nn.Conv2d's own.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() or not self._suits(input):
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled("cpu"):
            kind = torch.get_autocast_dtype("cpu")
            input, weight = input.to(kind), weight.to(kind)
            bias = None if bias is None else bias.to(kind)
        stride, padding = (self.stride[0], self.stride[1]), self.padding
        assert not isinstance(padding, str)
        return small_conv2d(input, weight, bias, stride, (int(padding[0]), int(padding[1])))

    def _suits(self, images: Tensor) -> bool:
        weight, (first, second), padding = self.weight, self.kernel_size, self.padding
        assert not isinstance(padding, str)
        if images.device.type != "cpu" or images.dim() != 4 or len(images) < LEAST_IMAGES:
            return False
        if images.shape[1] != self.in_channels or images.dtype not in _FORMATS:
            return False
        if not weight.is_contiguous(memory_format=torch.channels_last):
            return False
        size = (images.shape[2], images.shape[3])
        stride = (self.stride[0], self.stride[1])
        high, wide = output_size(size, (first, second), stride, (int(padding[0]), int(padding[1])))
        return min(high, wide) > 0 and high * wide <= MOST_POSITIONS


def speed_small_images(net: nn.Module) -> None:
    """Turn the large plain convolutions of `net` into SmallConv2d, in place; others stay."""
    for module in net.modules():
        if type(module) is nn.Conv2d and _plain(module):
            module.__class__ = SmallConv2d


@contextmanager
def library_convolutions(net: nn.Module) -> Iterator[None]:
    """Within, every convolution of `net` is torch's own, which `torch.func` can differentiate."""
    small = [module for module in net.modules() if type(module) is SmallConv2d]
    for module in small:
        module.__class__ = nn.Conv2d  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in small:
            module.__class__ = SmallConv2d


def _plain(conv: nn.Conv2d) -> bool:
    simple = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return simple and conv.padding != "same" and conv.weight.numel() >= LEAST_WEIGHTS
