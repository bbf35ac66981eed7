"""Relearn a model from images: the whole network, the head alone, from related data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from letheon.engine.models.classifier import Classifier
from letheon.errors import NotMeasurable
from letheon.eval.metrics.registry import SHARE, metric
from letheon.eval.probes.relearn import (
    RelearnCurve,
    feature_batches,
    find_rate,
    head_on_features,
    relearn,
)

WHOLE, HEAD, RELATED = "whole network", "head only", "related data"
SLACK = 0.05
"""Below the original's held-out accuracy on the forgotten classes: what counts as relearned."""
BATCH = 64
"""Images of a step."""
_ROWS = 256  # at a time, where nothing is learned


@dataclass(frozen=True)
class Lesson:
    """Images that every model relearns from and is tested on; one recipe for all."""

    images: Tensor  # (n, 3, H, W) float32 on the host, as many retain as forget training images
    labels: Tensor  # (n,) int64
    held_images: Tensor  # (m, 3, H, W) held-out images of the forgotten classes
    held_labels: Tensor  # (m,) int64
    steps: int
    rate: float = 0.01  # of SGD, for the whole network and from related data
    related: tuple[Tensor, Tensor] | None = None  # images and labels as above, of other images


def curves(
    model: Classifier,
    lesson: Lesson,
    device: torch.device,
    place: Callable[[Classifier], Classifier],
) -> dict[str, RelearnCurve]:
    """Measure held-out accuracy on the forgotten classes over the steps, for a copy of `model`.

    Retain images are learned beside the forgotten ones, since on forget images alone a model wins
    by naming nothing else. Float32; batch-norm and dropout as in evaluation.

    Args:
        model: of any device and mode; it stays as it is.
        lesson: the images.
        device: where to learn.
        place: copies a network to there.
    """
    frozen = place(model)
    inputs, held = (_features(frozen, side, device) for side in (lesson.images, lesson.held_images))
    head = head_on_features(model.head.weight, model.head.bias).to(device)
    sides: dict[str, tuple[nn.Module, Tensor, Tensor, Tensor]] = {
        HEAD: (head, inputs, lesson.labels, held),
        WHOLE: (model, lesson.images, lesson.labels, lesson.held_images),
    }
    if lesson.related is not None:
        sides[RELATED] = (model, *lesson.related, lesson.held_images)
    return {name: _curve(*side, lesson, device, place) for name, side in sides.items()}


@torch.no_grad()
def _features(model: Classifier, images: Tensor, device: torch.device) -> Tensor:
    """(n, D) on the device."""
    return torch.cat([model(part.to(device)).features for part in images.split(_ROWS)])


def _curve(
    net: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    test: Tensor,
    lesson: Lesson,
    device: torch.device,
    place: Callable[[Classifier], Classifier],
) -> RelearnCurve:
    sample = feature_batches(inputs, labels.to(inputs.device), BATCH, seed=0)
    truth = lesson.held_labels.to(device)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rows, names = sample(step)
        return rows.to(device), names.to(device)

    def accuracy(learner: nn.Module) -> float:
        answers = (learner(part.to(device)) for part in test.split(_ROWS))
        predictions = torch.cat(
            [getattr(answer, "logits", answer).argmax(dim=1) for answer in answers]
        )
        return float((predictions == truth).double().mean())

    every = max(1, lesson.steps // 20)
    if isinstance(net, nn.Linear):  # of features
        return relearn(net, batches, accuracy, steps=lesson.steps, every=every)
    return relearn(
        net, batches, accuracy, steps=lesson.steps, every=every, lr=lesson.rate, place=place
    )


def rate_of(
    model: Classifier,
    steps: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    place: Callable[[Classifier], Classifier],
) -> float:
    """Return the learning rate at which `model`, the original, can go on learning a lesson.

    Args:
        model: of any device and mode; it stays as it is.
        steps: images and labels of its first steps.
        device: where to learn.
        place: copies a network to there.
    """

    def batches(step: int) -> tuple[Tensor, Tensor]:
        images, labels = steps[step]
        return images.to(device), labels.to(device)

    return find_rate(model, batches, place)


Curves = dict[str, RelearnCurve]


@dataclass(frozen=True)
class Relearning:
    """A model's relearn curves and its peers': what metrics of the stage "relearning" read."""

    own: Curves
    original: Curves | None = None
    retrained: Curves | None = None  # of the reference; None for the reference itself

    def steps(self, curves: Curves, name: str) -> int:
        """First measured step with the original's accuracy less `SLACK`.

        Raises:
            NotMeasurable: no original model, one that knows nothing, or not within the steps taken.
        """
        if self.original is None:
            raise NotMeasurable("got no original model; expected one whose accuracy is the target")
        target = self.original[WHOLE].accuracy[0] - SLACK
        if target <= 0:  # every model would have relearned before its first step
            raise NotMeasurable(
                f"the original is right on {target + SLACK:.1%} of the held-out images of the "
                f"forgotten classes; expected more than {SLACK:.0%}: there is nothing to relearn"
            )
        curve = curves[name]
        for step, share in zip(curve.steps, curve.accuracy, strict=True):
            if share >= target:
                return step
        raise NotMeasurable(f"not relearned within {curve.steps[-1]} steps")


_SCHEMA = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["steps", "accuracy"],
        "properties": {
            "steps": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "accuracy": {"type": "array", "items": SHARE},
        },
    },
}
_GROUP = "Representation and probes"


@metric("relearn", title="Relearn curves", group=_GROUP, unit="table", stage="relearning",
        needs=("relearning",), place=28, schema=_SCHEMA)  # fmt: skip
def relearn_curves(of: Relearning) -> dict[str, Any]:
    """Held-out accuracy on the forgotten classes over relearning steps, by recipe."""
    return {
        name: {"steps": curve.steps, "accuracy": curve.accuracy} for name, curve in of.own.items()
    }


@metric(
    "relearn_steps", title="Relearn time", group=_GROUP, unit="steps", better="as retrained",
    stage="relearning", needs=("original", "relearning"), place=8,
)  # fmt: skip
def relearn_steps(of: Relearning) -> int:
    """Steps of one fixed recipe, the whole network on as many retain as forget images, until
    held-out accuracy on the forgotten classes is within 5 points of the original's; only multiples
    of the measuring interval can come out.
    """
    return of.steps(of.own, WHOLE)


@metric(
    "relearn_steps_head", title="Relearn time, head", group=_GROUP, unit="steps",
    better="as retrained", stage="relearning", needs=("original", "relearning"), place=9,
)  # fmt: skip
def relearn_steps_head(of: Relearning) -> int:
    """Relearn time where only the last linear layer learns, on frozen features."""
    return of.steps(of.own, HEAD)


@metric(
    "anamnesis_index", title="Anamnesis index", group=_GROUP, better="1", stage="relearning",
    needs=("original", "reference", "relearning"), source="Chundawat et al. 2023", place=10,
)  # fmt: skip
def anamnesis_index(of: Relearning) -> float:
    """Relearn steps over the retrained model's; 1 is ideal, less is residue."""
    if of.retrained is None:
        raise NotMeasurable("got no retrained model besides this one; expected one to compare with")
    steps = of.steps(of.retrained, WHOLE)
    if steps == 0:
        raise NotMeasurable("the retrained model had the accuracy before the first step")
    return of.steps(of.own, WHOLE) / steps
