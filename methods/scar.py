"""SCAR: move forget features towards the nearest wrong class in Mahalanobis distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.distributed import sum_over_ranks
from letheon.engine.method import Definition, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.teacher import teacher_output
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import class_covariances, outputs_by_index
from letheon.errors import InputError
from letheon.loaders.batch import Batch
from letheon.methods.distillation import class_mask, in_fp32, sum_of_halves
from letheon.methods.duck import nearest_others, output_bytes
from letheon.methods.paired import UntilForgotten
from letheon.methods.requirements import (
    require_between,
    require_positive,
    require_samples,
    require_two_classes,
)

SMALLEST = 1e-8
"""Features are at least this before they are raised to a power, whose slope at 0 is infinite."""


@dataclass
class ScarState(State):
    """The retained classes' distributions, and where each forget sample is to go."""

    means: Tensor  # (C, D), unit length
    precisions: Tensor  # (C, D, D)
    targets: Tensor  # (N,) int64
    teacher: Classifier = rebuilt()


def precision_matrices(covariances: Tensor, diagonal: float, others: float) -> Tensor:
    """(C, D, D): twice shrunk, normalized to correlations, and (pseudo) inverted.

    Shrinking adds `diagonal` times the mean variance on the diagonal, and `others` times the mean
    of the entries off it that are not 0 everywhere else.
    """
    eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    for _ in range(2):
        off = covariances * (1 - eye)
        variance = covariances.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        mean = (off.sum((1, 2)) / (off != 0).sum((1, 2)).clamp(min=1))[:, None, None]
        covariances = covariances + diagonal * variance * eye + others * mean * (1 - eye)
    scale = covariances.diagonal(dim1=1, dim2=2).clamp(min=SMALLEST).sqrt()
    return torch.linalg.pinv(covariances / (scale[:, :, None] * scale[:, None, :]), hermitian=True)


def mahalanobis(features: Tensor, means: Tensor, precisions: Tensor) -> Tensor:
    """(B,) (g - m)^T P (g - m), row by row, in the means' own number format."""
    with torch.autocast(features.device.type, enabled=False):
        apart = features.to(means.dtype) - means
        return torch.einsum("bi,bij,bj->b", apart, precisions, apart)


@dataclass(frozen=True)
class Scar(UntilForgotten):
    """SCAR: forget features go to the nearest wrong class; a teacher keeps the rest.

    With g(x) = f(x)^delta scaled to unit length, mu_c the mean and P_c the inverse of the shrunk
    correlations of f^delta over class c of the retain set, d_c = (g - mu_c)^T P_c (g - mu_c), mu_c
    at unit length, too. Descends distance_weight d_t(x) over a forget batch, t(x) the nearest class
    by the original network that is not x's own, plus kl_weight KL(p_o(z_o / T) || p) over samples
    to be kept, where forgotten classes have the smallest of the sample's logits (Bonato, Cotogni
    and Sabetta 2024, "Is Retain Set All You Need in Machine Unlearning?", eq. 1 to 5).

    delta 0.5, shrinkage 3 and 3, weights 1 and 5, Adam at 5e-4 are published, with batches of 1024
    for at most 30 epochs. Our reading: the images of the teacher's term are retain images; the
    authors take other images in their place, and need no retain set then. T is not known to us; 1
    is ours. Their code measures the forget accuracy after every step; here after every epoch.
    """

    name: ClassVar[str] = "scar"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="SCAR",
        reads="paired",
        formula="Mahalanobis distance to the nearest wrong class on F + 5 KL to the original on R; "
        "our reading",
        cost="2 E N_r g and l, N_f l an epoch",
        source="Bonato et al. 2024, eq. 1-5",
    )
    recipe: Recipe = Recipe(epochs=10, lr=5e-4, optimizer="adamw", weight_decay=0.0)
    delta: float = 0.5
    """Power of the features (Tukey's transformation)."""
    shrink_diagonal: float = 3.0
    """gamma_1."""
    shrink_others: float = 3.0
    """gamma_2."""
    distance_weight: float = 1.0
    """lambda_1."""
    kl_weight: float = 5.0
    """lambda_2."""
    temperature: float = 1.0
    """T, of the teacher alone."""
    until: float = 0.01
    """Forget accuracy, a fraction, below which the training ends; 0: never."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_positive("delta", self.delta)
        require_positive("temperature", self.temperature)
        for option in ("shrink_diagonal", "shrink_others", "distance_weight", "kl_weight"):
            require_between(option, getattr(self, option))
        require_between("until", self.until, 0, 1)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty, or fewer than two classes to go to."""
        require_samples(run, self.name)
        require_two_classes(run, self.name, run.model.classes - len(run.forget_classes))

    def sample_bytes(self, run: Run) -> int:
        """Its outputs, and its distances and features in float64, until the targets are found."""
        return output_bytes(run)

    def prepare(self, run: Run) -> ScarState:
        """Find the classes' distributions, and the nearest wrong one of each forget sample.

        Raises:
            InputError: features below zero, or fewer than two classes to go to.
        """
        count, mean, covariance = class_covariances(run, "retain", self.delta)
        require_two_classes(run, self.name, int((count > 0).sum()))
        outputs = outputs_by_index(run, "forget")
        below = (outputs.features < 0).any().long()
        sum_over_ranks([below], run.ranks)  # so that all refuse, or none
        if bool(mean.isnan().any()) or bool(below):
            raise InputError(
                f"got features below zero from {run.model.name}; scar raises them to a power of "
                f"{self.delta:g} and wants 0 or more, as after a ReLU; use duck"
            )
        precisions = precision_matrices(covariance, self.shrink_diagonal, self.shrink_others)
        means = F.normalize(mean, dim=1)
        features = self.transform(outputs.features.double())
        columns = [
            mahalanobis(features, m.expand_as(features), p.expand(len(features), -1, -1))
            for m, p in zip(means, precisions, strict=True)
        ]
        targets = nearest_others(run, torch.stack(columns, dim=1), outputs, count)
        kind = outputs.features.dtype
        return ScarState(means.to(kind), precisions.to(kind), targets, run.teacher())

    def transform(self, features: Tensor) -> Tensor:
        """(B, D) features to the power of delta, at unit length."""
        return F.normalize(in_fp32(features).clamp(min=SMALLEST) ** self.delta, dim=1)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """A forget batch beside each retain batch."""
        assert isinstance(state, ScarState)
        means, precisions, targets = state.means, state.precisions, state.targets
        teacher = state.teacher
        gone = class_mask(run)

        def pull(net: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                goal = in_fp32(teacher_output(teacher, batch.images).logits) / self.temperature
                goal = torch.where(gone, goal.amin(dim=1, keepdim=True), goal).log_softmax(dim=1)
            logits, features = net(batch.images)
            goes = targets[batch.index]
            far = mahalanobis(self.transform(features), means[goes], precisions[goes])
            answer = in_fp32(logits).log_softmax(dim=1)
            kl = (goal.exp() * (goal - answer)).sum(dim=1)  # (B,)
            return sum_of_halves(batch, self.distance_weight * far, self.kl_weight * kl)

        return [Phase("pull", "paired", pull)]
