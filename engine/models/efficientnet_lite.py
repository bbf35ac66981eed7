"""EfficientNet-Lite0, in the variant of the public weights.

Tan and Le 2019 ("EfficientNet: Rethinking Model Scaling", ICML), the Lite variant of 2020: no
squeeze-and-excitation, ReLU6. TensorFlow's "SAME" padding, which puts the odd pixel to the right
and below, and batch norm with eps 1e-3 and momentum 0.01. One departure: no drop-connect in
training, only the dropout before the last layer.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = (  # blocks, channels, stride of the first block, kernel, expansion
    (1, 16, 1, 3, 1),
    (2, 24, 2, 3, 6),
    (2, 40, 2, 5, 6),
    (3, 80, 2, 3, 6),
    (3, 112, 1, 5, 6),
    (4, 192, 2, 5, 6),
    (1, 320, 1, 3, 6),
)


def same_padding(pixels: int, kernel: int, stride: int) -> tuple[int, int]:
    """Compute TensorFlow's "SAME" padding as (before, after): ceil(pixels / stride) remain."""
    total = max((math.ceil(pixels / stride) - 1) * stride + kernel - pixels, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose zero padding follows the size of its input."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, groups: int = 1):
        super().__init__(channels_in, channels, kernel, stride, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(input.shape[2], kernel, stride)
        left, right = same_padding(input.shape[3], kernel, stride)
        if (top, left) == (bottom, right):
            return F.conv2d(input, self.weight, None, stride, (top, left), 1, self.groups)
        padded = F.pad(input, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, None, stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Widen by 1x1, convolve each channel, narrow by 1x1; added to its input where shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, kernel: int, expansion: int):
        super().__init__()
        wide = channels_in * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SameConv2d(channels_in, wide, 1, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv2d(wide, channels, 1, 1)
        self._bn2 = _norm(channels)
        self.adds = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """4.65 M parameters at 1000 classes; the pooled feature has 1280 numbers."""

    def __init__(self, classes: int):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = _norm(32)
        rows = [  # the first block of a stage has its stride
            (channels, stride if number == 0 else 1, kernel, expansion)
            for blocks, channels, stride, kernel, expansion in _STAGES
            for number in range(blocks)
        ]
        widths = pairwise([32, *(row[0] for row in rows)])
        self._blocks = nn.Sequential(
            *(
                InvertedResidual(before, channels, *row[1:])
                for (before, channels), row in zip(widths, rows, strict=True)
            )
        )
        self._conv_head = SameConv2d(320, 1280, 1, 1)
        self._bn1 = _norm(1280)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, classes)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(self._dropout(x.mean((2, 3))))
