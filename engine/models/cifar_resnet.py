"""The CIFAR ResNets of He et al. 2016, section 4.2 ("Deep Residual Learning", CVPR).

Three stages of n blocks with 16, 32, 64 channels, 6n+2 layers, parameter-free shortcuts (option A:
every second pixel, the new channels zero). The paper does not say where the new channels go; here
half lie before and half after the old ones, as in the public checkpoints whose keys these are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """`depth` = 6n+2 layers; the pooled feature has 64 numbers."""

    def __init__(self, depth: int, classes: int):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n, stride=1)
        self.layer2 = _stage(16, 32, n, stride=2)
        self.layer3 = _stage(32, 64, n, stride=2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [Block(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(channels_in, channels, stride), *rest)


def resnet18_cifar(classes: int) -> nn.Module:
    """Torchvision's ResNet-18 and its keys, with a 3x3 stem of stride 1 and no max-pool."""
    from torchvision.models import resnet18  # here: it brings torch's compiler, a second to import

    net = resnet18(num_classes=classes)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net
