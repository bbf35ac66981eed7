"""The network of the embedded example: four convolutions for 16 x 16 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Small(nn.Module):
    """Four 3x3 convolutions with batch norm, 66 thousand parameters; the feature has 64 numbers."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.conv4 = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, classes); H and W are at least 4."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)  # (B, 32, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)  # (B, 64, H/4, W/4)
        x = F.relu(self.bn4(self.conv4(x)))
        return self.fc(x.mean((2, 3)))
