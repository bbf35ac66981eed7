"""A small convolutional network that trains fast, after Jordan 2024 ("94% on CIFAR-10 in 3.29
seconds"): a fixed whitening layer, three blocks, and a head over the largest activations.

Written from the paper. Ours differ in two places: the head's logits are not scaled (its first
weights and its rate are, which is the same), and the last pooling takes any image size from 16 on.
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 5e-4
"""Added to the eigenvalues, so that a direction without variance is not blown up; the paper's."""


class WhiteningConv2d(nn.Conv2d):
    """2x2 convolution that decorrelates the patches of its input; only its bias trains.

    The weight is a buffer, under a convolution's own key: no optimizer, mask or method moves it.
    """

    def __init__(self, channels: int):
        super().__init__(channels, 8 * channels, 2)
        weight = self._parameters.pop("weight")
        assert weight is not None and self.bias is not None
        self.register_buffer("weight", weight.detach())
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def whiten(self, moments: Tensor, positions: int) -> None:
        """Set the weight from patches: each eigenvector over the root of its eigenvalue, and its
        negative.

        Args:
            moments: (D, D) float64, the sum of x x^T over patches x, D = 4 channels.
            positions: patches that were summed.
        """  # noqa: D205
        values, vectors = torch.linalg.eigh(moments.cpu() / positions)  # columns, rising
        largest = vectors.abs().argmax(dim=0)
        vectors = vectors * vectors.gather(0, largest[None]).sign()  # a sign of its own for each
        rows = (vectors / (values.clamp(min=0) + EPSILON).sqrt()).T
        both = torch.cat([rows, -rows])
        self.weight.copy_(both.reshape(self.weight.shape))


class Norm(nn.BatchNorm2d):
    """Batch-norm whose gain is fixed at 1; the gain is a buffer under its usual key."""

    def __init__(self, channels: int):
        super().__init__(channels)
        gain = self._parameters.pop("weight")
        assert gain is not None
        self.register_buffer("weight", gain.detach())


class Block(nn.Module):
    """A 3x3 convolution with pooling, then one more, or two with a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, depth: int):
        super().__init__()
        widths = [channels_in] + [channels] * depth
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(Norm(channels) for _ in range(depth))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            if conv.in_channels <= conv.out_channels:  # the first filters pass their input on
                with torch.no_grad():
                    nn.init.dirac_(conv.weight[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H // 2, W // 2)."""
        x = F.gelu(self.norms[0](F.max_pool2d(self.convs[0](x), 2)))
        start, last = x, len(self.convs) - 1
        for k in range(1, len(self.convs)):
            x = self.norms[k](self.convs[k](x))
            x = F.gelu(x + start if k == last > 1 else x)
        return x


class SpeedCnn(nn.Module):
    """Whitening, three blocks, the maximum over what is left of the image, a linear head.

    `widths` are the blocks' channels and the last of them the number of features; `depth` is the
    convolutions of a block: 2 for 94 % of CIFAR-10, 3 (with shortcuts) for 96 %.
    """

    def __init__(self, classes: int, widths: Sequence[int], depth: int):
        super().__init__()
        self.whitening = WhiteningConv2d(3)
        channels = [self.whitening.out_channels, *widths]
        self.block1, self.block2, self.block3 = (
            Block(before, after, depth) for before, after in pairwise(channels)
        )
        self.head = nn.Linear(widths[-1], classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, classes); H and W are at least 16."""
        x = F.gelu(self.whitening(x))
        x = self.block3(self.block2(self.block1(x)))
        # Not amax, whose gradient asks which values equal the largest: a compiler that works bf16
        # out again without rounding finds none of them, and divides by their number.
        return self.head(x.flatten(2).max(dim=2).values)
