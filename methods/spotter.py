"""Spotter: distil the original without the forgotten classes, and scatter their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.teacher import teacher_output
from letheon.engine.recipe import Recipe
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Batch
from letheon.methods.amun import AdversarialState, find_images, image_bytes
from letheon.methods.distillation import class_mask, divergence, in_fp32, mask_own
from letheon.methods.relations import all_rows, count_once, refuse_micro_batches
from letheon.methods.requirements import (
    require_between,
    require_positive,
    require_retained_class,
    require_samples,
)


@dataclass
class SpotterState(AdversarialState):
    """An image near each forget sample, and the original model."""

    teacher: Classifier = rebuilt()


def mean_similarity(rows: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine between two samples of one class, a scalar; 0 where no class has two.

    Args:
        rows: (b, D) of length one.
        labels: (b,) int64.
    """
    same = (labels[:, None] == labels[None, :]) & ~torch.eye(
        len(labels), dtype=torch.bool, device=labels.device
    )
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ rows.T * same).sum() / same.sum().clamp(min=1)


@dataclass(frozen=True)
class Spotter(Method):
    """Spotter: descend share KL(q(x) || p(x)) + (1 - share) KL(q(x') || p(x')) + weight S(F) on F.

    q is the original's answer without the forgotten classes (without a single sample's own class),
    x' an image near x: from a random place within `radius` of each pixel, sign steps up the loss of
    the original's best wrong class, which leads away from the boundary. S is the mean cosine of the
    pooled features of two samples of one class, over the samples of all ranks; scattered features
    have no prototype to relearn from (Ha, Park and Yoon 2026, "Unlearning's Blind Spots:
    Over-Unlearning and Prototypical Relearning Attack"). R is never read; batch-norm is frozen.

    Share 0.7, weight 1, radius 0.03, three steps of 0.01, SGD at 1e-4, batch 128 and 10 epochs are
    published for ResNet-18 on CIFAR-10. Distances are in the network's normalized input, as in the
    authors' code, which also clips it to 0 to 1, as if it were pixels; here it is not clipped. They
    train without augmentation; here x is augmented as in training, and x' is near the image as it
    is.
    """

    name: ClassVar[str] = "spotter"
    definition: ClassVar[Definition] = Definition(
        alias="Spotter",
        reads="forget",
        formula="0.7 KL(q, p) + 0.3 KL(q, p) near F + mean cosine of f within a class, q the "
        "original without the forgotten classes",
        cost="E N_f 8/3 g, 4 N_f g once",
        source="Ha et al. 2026",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"weight": (0.1, 10.0)}
    elementwise: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=10, lr=1e-4, batch_size=128)
    share: float = 0.7
    """lambda_1: weight of the samples themselves; what is left is that of the images near them."""
    weight: float = 1.0
    """lambda_2, of the mean cosine."""
    radius: float = 0.03
    """Largest change of a value of the normalized input."""
    step: float = 0.01
    """Of the attack, the same unit."""
    steps: int = 3
    """Of the attack."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_between("share", self.share, 0, 1)
        require_between("weight", self.weight)
        require_between("steps", self.steps)
        for option in ("radius", "step"):
            require_positive(option, getattr(self, option))

    def check(self, run: Run) -> None:
        """Refuse a request without a forget sample or of all classes, and micro-batches."""
        require_samples(run, self.name, retain=False)
        require_retained_class(run, self.name)
        refuse_micro_batches(run, reads="forget")

    def sample_bytes(self, run: Run) -> int:
        """An image."""
        return image_bytes(run)

    def prepare(self, run: Run) -> SpotterState:
        """Find the images near the forget samples; keep the original model."""
        what = (self.name, self.radius, self.step, self.steps)
        near = find_images(run, what, lambda batch: self._move(run, batch))
        return SpotterState(near.place, near.labels, near.images, run.teacher())

    def _move(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) near the batch's, and (B,) the class each is driven from."""
        images, size = batch.images, batch.images[0].numel()
        with torch.no_grad():
            goal = mask_own(run.model(images).logits, batch.labels).argmax(dim=1)
        draws = 2 * uniform(run.seed, "spotter", 0, batch.index, size) - 1
        offset = (self.radius * draws).to(images.dtype).view(images.shape)
        for _ in range(self.steps):
            offset.requires_grad_(True)
            loss = F.cross_entropy(run.model(images + offset).logits, goal, reduction="sum")
            (slope,) = torch.autograd.grad(loss, offset)
            offset = offset.detach() + self.step * slope.sign()
            offset = offset.clamp(-self.radius, self.radius)
        return images + offset, goal

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set."""
        assert isinstance(state, SpotterState)
        teacher, ranks = state.teacher, run.ranks
        gone, by_class = class_mask(run), bool(run.forget_classes)

        def scatter(net: nn.Module, batch: Batch) -> Tensor:
            assert batch.rows is not None
            near = batch.rows.to(batch.images.dtype)
            both, labels = torch.cat([batch.images, near]), batch.labels.repeat(2)
            goal = in_fp32(teacher_output(teacher, both).logits)
            goal = goal.masked_fill(gone, -torch.inf) if by_class else mask_own(goal, labels)
            logits, features = net(both)
            own, other = divergence(logits, goal).chunk(2)  # (B,) each
            kept = (self.share * own + (1 - self.share) * other).mean()
            unit = F.normalize(in_fp32(features.chunk(2)[0]), dim=1)
            rows = all_rows(unit, run, batch.total)
            all_labels = all_rows(batch.labels, run, batch.total)
            near_each_other = count_once(mean_similarity(rows, all_labels), batch, ranks)
            return kept + self.weight * near_each_other

        return [Phase("scatter", "forget", scatter, "frozen", rows=state.images)]
