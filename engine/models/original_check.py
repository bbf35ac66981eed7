"""Look at the original before it is to forget: does it know the images it is shown?

A network whose classes are in another order, or whose images are normalized otherwise than in its
training, is right by chance alone while it is sure of its answers. That it is unsure, as a network
of a short training is, is no fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, agree, gather_rows
from letheon.engine.memory.shards import is_split, keep_pace
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.errors import InputError
from letheon.kernels import keyed
from letheon.loaders.batch import Loader
from letheon.loaders.preset import Preset

SAMPLES = 128
"""Retain images that are looked at, at most."""
SIGMAS = 6.0
"""How far answers must lie from what is compared before a network is refused, or a cause named."""
LEAST = 32
"""Fewer images than this prove nothing."""
SCALES = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
)
"""Mean and std of ImageNet, of -1..1, of 0..1 and of CIFAR-10."""
SIZES = (32, 64, 96, 160, 224)


@dataclass(frozen=True)
class Answers:
    """What a network says of n images."""

    labels: Tensor  # (n,) int64, the truth
    named: Tensor  # (n,) int64, the class of the largest logit
    sure: Tensor  # (n,) float64, its probability

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float((self.labels == self.named).double().mean())

    @property
    def chance(self) -> float:
        """Share of the largest class: what always naming it gets right."""
        return float(self.labels.bincount().max()) / len(self.labels)

    @property
    def above_chance(self) -> bool:
        """Whether more is right than chance explains."""
        p, n = self.chance, len(self.labels)
        return self.accuracy > p + 3 * math.sqrt(p * (1 - p) / n)

    @property
    def overrated(self) -> bool:
        """Whether fewer answers are right than their own probabilities allow for."""
        expected = float(self.sure.sum())
        spread = math.sqrt(float((self.sure * (1 - self.sure)).sum()) + 1)
        hits = int((self.labels == self.named).sum())
        return expected - hits > SIGMAS * spread


@dataclass(frozen=True)
class Look:
    """A network and the training images that it is to know."""

    model: Classifier
    loader: Loader
    forget: Tensor  # (N,) bool, on any device
    precision: Precision
    ranks: Ranks
    open_as: Callable[[Preset], Loader]
    """Opens the images under another preset, to find out whether one fits."""


def check_original(look: Look) -> None:
    """Refuse a network that is sure of its answers on retain images and right by chance alone.

    Reads `SAMPLES` keyed retain images under the test transform; every rank must call. The model's
    mode, device and random state stay as they were.

    Raises:
        InputError: on every rank, with the likely cause.
    """
    rows = _sample(look)
    answers = _ask(look, lambda: look.loader, rows)
    labels = answers.labels
    if len(labels) < LEAST or answers.chance == 1 or answers.above_chance or not answers.overrated:
        return
    refusal = InputError(
        f"got an original that is right on {answers.accuracy:.1%} of {len(labels)} retain images, "
        f"no better than always naming one class ({answers.chance:.1%}), and sure of its answers "
        f"({float(answers.sure.mean()):.1%} on average); expected one that knows these images; "
        f"{_cause(look, answers, rows)}; or allow it where it is meant",
        option="accept_chance",
    )
    refusal.everywhere = True
    raise refusal


def _sample(look: Look) -> list[int]:
    retain = (~look.forget).nonzero().flatten().cpu()
    drawn = keyed.uniform(0, "original-check", 0, retain, 1)[:, 0].argsort(stable=True)[:SAMPLES]
    return [int(i) for i in retain[drawn].sort().values]


def _ask(
    look: Look,
    open_loader: Callable[[], Loader],
    rows: list[int],
    failures: tuple[type[Exception], ...] = (InputError,),
) -> Answers:
    """What the model says of these samples, those of all ranks together.

    Raises:
        InputError: on every rank, where one of them failed in a way of `failures`.
    """
    columns: list[Tensor] = []
    problem: str | None = None
    option = ""
    try:
        columns = _columns(look, open_loader(), rows)
    except failures as error:
        problem, option = str(error), getattr(error, "option", "")
    agree(look.ranks, problem, option)
    return Answers(*(gather_rows(column, look.ranks).cpu() for column in columns))


def _columns(look: Look, loader: Loader, rows: list[int]) -> list[Tensor]:
    """This rank's labels, classes named and probabilities; the model is left as it was."""
    model, device = look.model, look.ranks.device
    before, training = next(model.parameters()).device, model.training
    none = torch.zeros(0, dtype=torch.int64, device=device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = [(none, none, none.double())]

    try:
        model.to(device).eval()
        with torch.no_grad():
            for host in keep_pace([model], loader.sweep(rows)):
                batch = host.to(device)
                with look.precision.autocast(device):
                    logits = model(batch.images).logits
                sure, named = logits.double().softmax(dim=1).max(dim=1)
                parts.append((batch.labels, named, sure))
    finally:
        model.to(before).train(training)
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _cause(look: Look, answers: Answers, rows: list[int]) -> str:
    """Name what explains the answers: the order of the classes, another preset, or another set."""
    order = _other_order(answers, look.model.classes)
    if order is not None:
        names = look.model.class_names or tuple(map(str, range(look.model.classes)))
        pairs = [f"{names[a]} as {names[b]}" for a, b in enumerate(order) if a != b]
        return (
            f"its classes are in another order than the images' ({', '.join(pairs[:3])}"
            f"{', ...' if len(pairs) > 3 else ''}): list them in its own order in a file, and name "
            "that as classes"
        )
    best, said = answers, ""
    changes = _presets(look.model.preset)
    if is_split(look.model):  # a size that it cannot take would leave its blocks gathered
        changes = [change for change in changes if "size" not in change]
    for change in changes:
        preset = replace(look.model.preset, **change)
        try:  # a size may be one that the network or the loader cannot take
            other = _ask(look, partial(look.open_as, preset), rows, (InputError, RuntimeError))
        except InputError:  # on every rank, see `agree`
            continue
        if other.accuracy > best.accuracy:
            best, said = other, ", ".join(f"{key} {value}" for key, value in change.items())
    if best.above_chance and best.accuracy > 2 * answers.accuracy:
        return f"with {said} it is right on {best.accuracy:.1%}: give the preset it had"
    return (
        "neither another order of its classes nor a usual preset explains it: it was trained on "
        "other images, or its classes mean something else"
    )


def _presets(preset: Preset) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = []
    changes += [{"mean": mean, "std": std} for mean, std in SCALES if mean != preset.mean]
    changes += [{"size": n, "resize_to": n} for n in SIZES if n != preset.size]
    return changes


def _other_order(answers: Answers, classes: int) -> list[int] | None:
    """What each class of the model is called, if one naming explains the answers.

    It is found on every other image and must hold on the rest, so that it is not read into noise.
    """
    table = torch.zeros(classes, classes, dtype=torch.int64)  # named, true
    halves = [slice(0, None, 2), slice(1, None, 2)]
    fit, rest = (Answers(answers.labels[h], answers.named[h], answers.sure[h]) for h in halves)
    table.index_put_((fit.named, fit.labels), torch.ones_like(fit.labels), accumulate=True)
    order = torch.where(table.sum(dim=1) > 0, table.argmax(dim=1), torch.arange(classes))
    renamed = Answers(rest.labels, order[rest.named], rest.sure)
    p = rest.chance
    if renamed.accuracy <= p + SIGMAS * math.sqrt(p * (1 - p) / len(rest.labels)):
        return None
    return [int(one) for one in order]
