"""Attacks on the weights: coarser numbers, and the straight path to the original."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.models.classifier import Classifier
from letheon.errors import NotMeasurable

BITS = 4
"""Bits of a weight after rounding."""
PLACES = (0.25, 0.5, 0.75)
"""Places on the path at which the loss is measured."""
ROWS = 256
"""Images at a time."""


@torch.no_grad()
def answer(net: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """(n, C) float32 logits on the host, in parts of `ROWS` images."""
    parts = [net(part.to(device)).logits.float().cpu() for part in images.split(ROWS)]
    return torch.cat(parts)


def quantize(model: Classifier) -> Classifier:
    """Round the weights of a copy of `model` to 2^(BITS - 1) - 1 steps a side, channel by channel.

    Round-to-nearest with the largest weight of each output channel as the end of its scale;
    tensors of one dimension (biases, norms) stay.
    """
    coarse = copy.deepcopy(model)
    with torch.no_grad():
        for weight in coarse.parameters():
            if weight.dim() > 1:
                rows = weight.flatten(1)
                scale = rows.abs().amax(dim=1, keepdim=True) / (2 ** (BITS - 1) - 1)
                whole = (rows / scale.clamp(min=1e-12)).round() * scale
                weight.copy_(whole.view_as(weight))
    return coarse


def interpolate(first: Classifier, second: Classifier, place: float) -> Classifier:
    """Return the network at `place` of the straight path from `first` (0) to `second` (1).

    Parameters and running statistics are both interpolated, and nothing is estimated again.

    Raises:
        NotMeasurable: other names or shapes.
    """
    own, other = first.state_dict(), second.state_dict()
    if any(name not in other or other[name].shape != own[name].shape for name in own):
        raise NotMeasurable("got an original of another architecture; expected the same")
    between = copy.deepcopy(first)
    between.load_state_dict(
        {
            name: values.lerp(other[name].to(values), place)
            if values.is_floating_point()
            else values
            for name, values in own.items()
        }
    )
    return between


def barrier(
    model: Classifier,
    original: Classifier,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    place: Callable[[Classifier], Classifier],
) -> float:
    """Compute the loss barrier of linear mode connectivity (Frankle et al. 2020), in nats.

    The largest excess, over `PLACES`, of the cross-entropy on the straight path over the line
    between the two ends' values; below 0 where the path lies under that line.

    Args:
        model: of any device and mode, as is `original`; it stays as it is.
        original: the other end.
        images: (n, 3, H, W) float32 retain images.
        labels: (n,) int64.
        device: where to run.
        place: copies a network to where it runs.
    """

    def loss(net: Classifier) -> float:
        return float(F.cross_entropy(answer(place(net), images, device), labels))

    start, end = loss(model), loss(original)
    return max(
        loss(interpolate(model, original, at)) - ((1 - at) * start + at * end) for at in PLACES
    )
