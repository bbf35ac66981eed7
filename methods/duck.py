"""DUCK: move the features of forget samples to the nearest centroid of another class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import sum_over_ranks
from letheon.engine.method import Accuracies, Decision, Definition, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import IndexedOutputs, class_moments, outputs_by_index
from letheon.loaders.batch import Batch
from letheon.methods.distillation import in_fp32, sum_of_halves
from letheon.methods.paired import UntilForgotten
from letheon.methods.requirements import (
    require_between,
    require_positive,
    require_samples,
    require_two_classes,
)


@dataclass
class CentroidState(State):
    """Where each forget sample is to go, and when the second stage begins."""

    centroids: Tensor  # (C, D) of the retain set's features; zero for a class without any
    targets: Tensor  # (N,) int64, a class for each forget sample; 0 elsewhere
    turn: int  # the first epoch of the second stage


def nearest_others(run: Run, distances: Tensor, outputs: IndexedOutputs, count: Tensor) -> Tensor:
    """(N,) int64: for each forget sample the nearest class but its own; 0 for all others.

    Args:
        run: the run.
        distances: (n, C), from each row of `outputs` to each class.
        outputs: of this rank's n forget samples.
        count: (C,) retain samples of each class; a class without any is none to go to.

    Returns:
        Equal on every rank; every rank must call.
    """
    barred = (count == 0).expand_as(distances).clone()
    barred[torch.arange(len(barred)), outputs.labels] = True
    targets = torch.zeros(len(run.forget), dtype=torch.int64, device=distances.device)
    targets[outputs.index] = distances.masked_fill(barred, torch.inf).argmin(dim=1)
    sum_over_ranks([targets], run.ranks)  # each sample is one rank's; elsewhere it is 0
    return targets


def output_bytes(run: Run) -> int:
    """Count the bytes of one sample's outputs, and of features and distances in float64."""
    head = run.model.head
    numbers: int = head.in_features + head.out_features
    return numbers * (head.weight.element_size() + 8)


def cosine_distances(features: Tensor, centroids: Tensor) -> Tensor:
    """(n, C): one minus the cosine between each row and each centroid."""
    return 1 - F.normalize(features, dim=1) @ F.normalize(centroids, dim=1).T


@dataclass(frozen=True)
class Duck(UntilForgotten):
    """DUCK: forget features go to the nearest wrong centroid, retain samples keep their labels.

    Descends distance_weight (1 - cos(f(x), mu_t(x))) over a forget batch plus ce_weight CE(z / T)
    over a retain batch; mu_c is the mean feature of class c over the retain set and t(x) the
    nearest by cosine that is not x's own class, both by the original network (Cotogni et al. 2024,
    "DUCK: Distance-based Unlearning via Centroid Kinematics", eq. 1 to 4). Ends once the forget
    accuracy is below `until`.

    Weights 1 and 1.4, T 2, Adam at 4e-4 without decay, batch 256, are published for CIFAR-10; they
    train up to 200 epochs, the rate halved at 25 and 40, with 41 retain batches for each forget
    batch. Our reading: each retain batch has a forget batch beside it. In the authors' code
    centroids are those of the first 50 batches, targets are kept 41 times for each batch and read
    by its number, so that from the second epoch on every batch goes to the first one's targets.

    Their code always adds a second stage, which the equations do not have: with a new Adam at 1e-4
    and retain batches of 512, CE(z / T) with weight 1 and a tenth of the distance, two passes
    (`second_epochs` 2). Its rate falls by a cosine, here it is constant; its forget samples are the
    first 128 in every step where a class is forgotten, here all in turn.
    """

    name: ClassVar[str] = "duck"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="DUCK",
        reads="paired",
        formula="1 - cos(f, nearest wrong centroid) on F + 1.4 CE(z / T) on R; the second stage of "
        "its authors' code by second-epochs 2; our reading",
        cost="2 E N_r g, N_f l an epoch",
        source="Cotogni et al. 2024, eq. 1-4",
    )
    recipe: Recipe = Recipe(epochs=10, lr=4e-4, optimizer="adamw", weight_decay=0.0)
    distance_weight: float = 1.0
    """lambda_1, of the cosine distance."""
    ce_weight: float = 1.4
    """lambda_2, of the retain batch's cross-entropy."""
    temperature: float = 2.0
    """T: the retain logits are divided by it."""
    until: float = 0.01
    """Forget accuracy, a fraction, below which the training ends; 0: never, and none is measured.
    The published value for classes; for single samples the authors take the held-out accuracy."""
    second_epochs: int = 0
    """Epochs of the second stage, the last of the run; 2: as published. It begins once the first
    stage ends by `until`, or else so many epochs before the end."""
    second_lr: float = 1e-4
    """Rate of the second stage."""
    second_batch_size: int | None = None
    """Retain samples of a step of the second stage, 512 as published; default: batch_size."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_between("distance_weight", self.distance_weight)
        require_between("ce_weight", self.ce_weight)
        require_positive("temperature", self.temperature)
        require_between("until", self.until, 0, 1)
        require_between("second_epochs", self.second_epochs, 0, self.recipe.epochs)
        require_between("second_lr", self.second_lr)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty, or fewer than two classes to go to."""
        require_samples(run, self.name)
        require_two_classes(run, self.name, run.model.classes - len(run.forget_classes))

    def sample_bytes(self, run: Run) -> int:
        """Its outputs, and its distances and features in float64, until the targets are found."""
        return output_bytes(run)

    def prepare(self, run: Run) -> CentroidState:
        """Find the centroids, and the nearest wrong one of each forget sample."""
        count, mean, _ = class_moments(run, "retain")
        require_two_classes(run, self.name, int((count > 0).sum()))
        outputs = outputs_by_index(run, "forget")
        distances = cosine_distances(outputs.features.double(), mean)
        targets = nearest_others(run, distances, outputs, count)
        turn = run.recipe.epochs - self.second_epochs
        return CentroidState(mean.to(outputs.features.dtype), targets, turn)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """A forget batch beside each retain batch."""
        assert isinstance(state, CentroidState)
        centroids, targets = state.centroids, state.targets

        second = epoch >= state.turn
        distance_weight = self.distance_weight / 10 if second else self.distance_weight
        ce_weight = 1.0 if second else self.ce_weight

        def pull(net: nn.Module, batch: Batch) -> Tensor:
            logits, features = net(batch.images)
            goal = centroids[targets[batch.index]]  # (B, D)
            near = F.cosine_similarity(features.to(goal.dtype), goal)  # (B,)
            losses = F.cross_entropy(
                in_fp32(logits) / self.temperature, batch.labels, reduction="none"
            )
            far = distance_weight * (1 - near)
            return sum_of_halves(batch, far, ce_weight * losses)

        if not second:
            return [Phase("pull", "paired", pull)]
        return [Phase("second", "paired", pull, slot="second", batch_size=self.second_batch_size)]

    def rate(self, run: Run, slot: str, epoch: float) -> float:
        """The recipe's; in the second stage its own."""
        return self.second_lr if slot == "second" else run.recipe.rate(epoch)

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        """End the first stage once the forget set is forgotten, and the run after the second."""
        assert isinstance(state, CentroidState)
        after = run.epoch_number + 1
        if after <= state.turn:
            if super().after_epoch(run, state, accuracies) == "go on":
                return "go on"
            state.turn = after
        return "go on" if after < state.turn + self.second_epochs else "stop"
