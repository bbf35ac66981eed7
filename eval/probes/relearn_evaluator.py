"""Relearn curves of a model from images: the whole network, the head alone, from related data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from letheon.engine.models.classifier import Classifier
from letheon.eval.probes.relearn import (
    Relearned,
    anamnesis_index,
    feature_batches,
    head_on_features,
    relearn,
)

WHOLE, HEAD, RELATED = "whole network", "head only", "related data"
SLACK = 0.05
"""Below the original's held-out accuracy on the forgotten classes: what counts as relearned."""
_BATCH = 64
_ROWS = 256  # at a time, where nothing is learned


@dataclass(frozen=True)
class Lesson:
    """What every model learns from and is asked; one recipe for all."""

    images: Tensor  # (n, 3, H, W) float32 on the host, as many retain as forget training images
    labels: Tensor  # (n,) int64
    held_images: Tensor  # (m, 3, H, W) held-out images of the forgotten classes
    held_labels: Tensor  # (m,) int64
    steps: int
    related: tuple[Tensor, Tensor] | None = None  # images and labels as above, of other images


def curves(model: Classifier, lesson: Lesson, device: torch.device) -> dict[str, Relearned]:
    """Held-out accuracy on the forgotten classes over the steps, for a copy of `model`.

    Retain images are learned beside the forgotten ones, since on forget images alone a model wins
    by naming nothing else. Float32; batch-norm and dropout as in evaluation.

    Args:
        model: of any device and mode; it stays as it is.
        lesson: the images.
        device: where to learn.
    """
    learner = copy.deepcopy(model).to(device).eval()
    told, held = (_features(learner, side, device) for side in (lesson.images, lesson.held_images))
    head = head_on_features(learner.head.weight, learner.head.bias)
    sides: dict[str, tuple[nn.Module, Tensor, Tensor, Tensor]] = {
        HEAD: (head, told, lesson.labels, held),
        WHOLE: (learner, lesson.images, lesson.labels, lesson.held_images),
    }
    if lesson.related is not None:
        sides[RELATED] = (learner, *lesson.related, lesson.held_images)
    return {name: _curve(*side, lesson, device) for name, side in sides.items()}


@torch.no_grad()
def _features(model: Classifier, images: Tensor, device: torch.device) -> Tensor:
    """(n, D) on the device."""
    return torch.cat([model(part.to(device)).features for part in images.split(_ROWS)])


def _curve(
    net: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    held: Tensor,
    lesson: Lesson,
    device: torch.device,
) -> Relearned:
    drawn = feature_batches(inputs, labels.to(inputs.device), _BATCH, seed=0)
    truth = lesson.held_labels.to(device)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rows, names = drawn(step)
        return rows.to(device), names.to(device)

    def right(now: nn.Module) -> float:
        answers = (now(part.to(device)) for part in held.split(_ROWS))
        said = torch.cat([getattr(answer, "logits", answer).argmax(dim=1) for answer in answers])
        return float((said == truth).double().mean())

    every = max(1, lesson.steps // 20)
    return relearn(net, batches, right, steps=lesson.steps, every=every)


def told(
    found: dict[str, Relearned], original: dict[str, Relearned] | None, retrained: Any
) -> dict[str, Any]:
    """A row's relearn curves, steps and index.

    Args:
        found: the model's curves.
        original: the original model's, whose accuracy before the first step sets the target.
        retrained: the curves of the retrained reference, or None.
    """
    row: dict[str, Any] = {
        "relearn": {
            name: {"steps": curve.steps, "accuracy": curve.accuracy}
            for name, curve in found.items()
        }
    }
    if original is None:
        return row
    target = original[WHOLE].accuracy[0] - SLACK
    ours = {name: _reaching(curve, target) for name, curve in found.items()}
    row |= {"relearn_steps": ours[WHOLE].reached, "relearn_steps_head": ours[HEAD].reached}
    if retrained is not None:
        row["anamnesis_index"] = anamnesis_index(ours[WHOLE], _reaching(retrained[WHOLE], target))
    return row


def _reaching(curve: Relearned, target: float) -> Relearned:
    pairs = zip(curve.steps, curve.accuracy, strict=True)
    return curve._replace(reached=next((s for s, share in pairs if share >= target), None))
