"""VGG-16 with batch norm for CIFAR, as the tables of SalUn and l1-sparse have it.

Simonyan and Zisserman 2015 ("Very Deep Convolutional Networks", ICLR), configuration D without its
last pooling, convolutions without bias, and a head of three linear layers of 256 numbers.
"""

from __future__ import annotations

from torch import Tensor, nn

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVgg(nn.Module):
    """15.3 M parameters at 10 classes; the feature has 256 numbers."""

    def __init__(self, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for number, stage in enumerate(_STAGES):
            if number:
                layers.append(nn.MaxPool2d(2))
            for channels in stage:
                conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                before = channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 4, 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, classes),
        )
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, classes); H and W are at least 16."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
