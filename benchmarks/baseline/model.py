"""The networks of the baseline: normalization inside, features by a hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet18

from letheon.engine.models.small import Small
from letheon.loaders.preset import Preset


class Normalized(nn.Module):
    """(x - mean) / std, then the network, as the published models carry it."""

    def __init__(self, net: nn.Module, preset: Preset) -> None:
        super().__init__()
        self.net = net
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(preset.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preset.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 to logits (B, classes)."""
        logits: Tensor = self.net((images - self.mean) / self.std)
        return logits


def read_facts(weights: Path) -> dict[str, str]:
    """What the file says of itself."""
    with safe_open(weights, framework="pt") as file:
        return dict(file.metadata())


def read_preset(weights: Path) -> Preset:
    """How the stored network wants its images."""
    values: dict[str, Any] = json.loads(read_facts(weights)["preset"])
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Preset(**cast(dict[str, Any], tuples))


def load(weights: Path, device: torch.device) -> Normalized:
    """A stored resnet18 or small network, in evaluation mode, NCHW float32."""
    name = read_facts(weights)["architecture"]
    state = load_file(weights)
    classes = len(state["fc.weight"])
    net = resnet18(num_classes=classes) if name == "resnet18" else Small(classes)
    net.load_state_dict(state)
    return Normalized(net, read_preset(weights)).to(device).eval()


class Hook:
    """Keeps what the pooling layer gave in the last forward pass; (B, D)."""

    def __init__(self, model: Normalized) -> None:
        # The small network pools outside any module: there it is what the last layer is given.
        pooling = getattr(model.net, "avgpool", None)
        self.features: Tensor
        layer: nn.Module = model.net.fc if pooling is None else pooling  # type: ignore[assignment]
        self._handle = layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept = inputs[0] if isinstance(layer, nn.Linear) else output
        self.features = kept.flatten(1)

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()
