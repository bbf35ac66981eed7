"""Attacks on the input: a learned offset for every image, and the neighbors of forget images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.models.classifier import Classifier
from letheon.errors import NotMeasurable
from letheon.eval.attacks.weights import answer
from letheon.eval.inference.sampling import stratified_halves
from letheon.eval.probes.relearn import feature_batches

RADIUS = 8 / 255
"""Largest change of a pixel that makes a neighbor, of the range from 0 to 1."""
_BATCH, _LR, _PUSHES = 64, 0.02, 3


def prompt(
    model: Classifier, images: Tensor, labels: Tensor, steps: int, device: torch.device
) -> float:
    """Learn one offset to all images that makes a frozen model name them; return what it recovers.

    ForgetGate's visual prompt (2025) of one number a pixel and channel: Adam on the cross-entropy
    of one half of the forget images, the accuracy on the other half.

    Args:
        model: in evaluation mode, on the device; its weights stay.
        images: (n, 3, H, W) float32 forget images; of each class one half is learned from, the
            other asked.
        labels: (n,) int64.
        steps: of Adam, at 0.02 of the normalized range, batches of 64.
        device: where to run.

    Raises:
        NotMeasurable: fewer than two images.
    """
    if len(images) < 2:
        raise NotMeasurable(f"got {len(images)} forget images; expected 2 or more")
    offset = torch.zeros_like(images[:1], device=device).requires_grad_(True)
    optimizer = torch.optim.Adam([offset], lr=_LR)
    fit, asked = stratified_halves(labels)
    batch = feature_batches(images[fit], labels[fit], _BATCH, seed=0)
    for step in range(steps):
        inputs, names = batch(step)
        loss = F.cross_entropy(model(inputs.to(device) + offset).logits, names.to(device))
        (offset.grad,) = torch.autograd.grad(loss, [offset])
        optimizer.step()
    found = answer(model, images[asked] + offset.detach().cpu(), device).argmax(dim=1)
    return float((found == labels[asked]).double().mean())


def push(original: Classifier, images: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """Move images away from their class, as the original sees it, within `RADIUS` of each pixel.

    Projected signed-gradient ascent of its loss (Madry et al. 2018), 3 steps, each of half the
    radius; the preset's deviations turn the radius into normalized units.

    Returns:
        (n, 3, H, W) float32 on the host.
    """
    spread = torch.tensor(original.preset.std).view(1, 3, 1, 1).to(device)
    radius = RADIUS / spread
    parts = []
    for part, names in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
        start = part.to(device)
        near = start.clone()
        for _ in range(_PUSHES):
            near.requires_grad_(True)
            loss = F.cross_entropy(original(near).logits, names.to(device), reduction="sum")
            (slope,) = torch.autograd.grad(loss, [near])
            near = (near.detach() + radius / 2 * slope.sign()).clamp(start - radius, start + radius)
        parts.append(near.cpu())
    return torch.cat(parts)


def divergence(first: Tensor, second: Tensor, gone: tuple[int, ...]) -> float:
    """Compute the mean Jensen-Shannon divergence of two models' answers on the kept classes, nats.

    Args:
        first: (n, C) logits.
        second: (n, C) logits.
        gone: forgotten classes, left out of both before the softmax.

    Raises:
        NotMeasurable: fewer than two classes are kept.
    """
    kept = [c for c in range(first.shape[1]) if c not in gone]
    if len(kept) < 2:
        raise NotMeasurable("got fewer than two kept classes; expected answers to compare")
    p, q = (logits[:, kept].double().softmax(dim=1) for logits in (first, second))
    middle = (p + q) / 2
    each = [torch.special.xlogy(r, r / middle.clamp(min=1e-300)).sum(dim=1) for r in (p, q)]
    return float((each[0] + each[1]).mean() / 2)
