"""Training the forget set on random labels (Golatkar et al. 2020; the inner method of SalUn)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Batch
from letheon.methods.finetune import cross_entropy
from letheon.methods.requirements import require_retained_class

Draw = Literal["other", "retained", "any"]


def draw_labels(batch: Batch, allowed: Tensor, draw: Draw, seed: int, epoch: Tensor) -> Tensor:
    """(B,) int64 random labels, a function of (seed, epoch, sample index) alone.

    Args:
        batch: whose `index` keys the draw and whose `labels` are the truth.
        allowed: (K,) int64 sorted classes to draw from.
        draw: ``other`` never gives the true label; ``retained`` and ``any`` draw from `allowed`
            as it is.
        seed: the run's seed.
        epoch: 0-dim int64.
    """
    u = uniform(seed, "random-label", epoch, batch.index, 1)[:, 0]  # (B,) float64
    if (
        draw == "other"
    ):  # K - 1 choices: step over the truth, which `allowed` holds at its own place
        pick = (u * (len(allowed) - 1)).long()
        pick = pick + (pick >= batch.labels).long()
    else:
        pick = (u * len(allowed)).long()
    return allowed[pick]


@dataclass
class RandomLabelState(State):
    """Which classes labels are drawn from."""

    classes: Tensor  # (K,) int64, sorted


@dataclass(frozen=True)
class RandomLabel(Method):
    """RL: forget samples learn drawn labels while retain samples keep theirs.

    SalUn's paper (Fan et al. 2024, eq. 5) descends E_forget[CE(y')] + alpha E_retain[CE(y)] with
    y' != y. Its code does three different things, all here by name; `docs/methods.md` tells why
    the defaults are as they are.
    """

    name: ClassVar[str] = "random-label"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="RL",
        reads="mixed",
        formula="CE(F, random labels) + alpha CE(R), each sample once",
        cost="1",
        source="Golatkar et al. 2020; Fan et al. 2024",
    )
    recipe: Recipe = Recipe(epochs=10, lr=0.013)
    order: Literal["mixed", "paired", "sequential", "forget-only"] = "mixed"
    """mixed: both sets shuffled together, each sample once an epoch (the authors' CIFAR-100 and
    Tiny-ImageNet code); paired: a forget batch beside each retain batch (the paper's sum);
    sequential: the forget set, then the retain set (their CIFAR-10 code); forget-only: no retain
    data (the ImageNet code of arXiv 2503.06991)."""
    draw: Draw = "other"
    """other: any class but the true one (the paper); retained: any class that is kept; any: any
    class at all, the truth included (the published code)."""
    alpha: float = 1.0
    """Weight of each retain sample beside each forget sample; mixed and paired only."""
    forget_batch_norm: Literal["auto", "frozen", "recipe"] = "auto"
    """Batch-norm in a pass over forget samples alone. auto: `recipe` where a retain pass follows
    (sequential), `frozen` where none does (forget-only); the published code has `recipe`."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"got alpha {self.alpha}; expected a finite number of 0 or more")

    @property
    def separates_forget(self) -> bool:  # type: ignore[override]
        """Only in the sequential order."""
        return self.order == "sequential"

    def check(self, run: Run) -> None:
        """Refuse a request that leaves no class to draw a label from."""
        if self.draw == "retained":
            require_retained_class(run, f"{self.name} with labels of retained classes")

    def prepare(self, run: Run) -> RandomLabelState:
        """Choose the classes to draw from."""
        classes = torch.arange(run.model.classes, device=run.ranks.device)
        if self.draw == "retained":
            keep = torch.ones_like(classes, dtype=torch.bool)
            keep[list(run.forget_classes)] = False
            classes = classes[keep]
        return RandomLabelState(classes)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass of both sets together, or one of each."""
        assert isinstance(state, RandomLabelState)
        classes, seed, now = state.classes, run.seed, run.epoch

        def relabel(net: nn.Module, batch: Batch) -> Tensor:
            new = draw_labels(batch, classes, self.draw, seed, now)
            labels = torch.where(batch.forget, new, batch.labels)
            losses = F.cross_entropy(net(batch.images).logits, labels, reduction="none")  # (B,)
            return (losses * torch.where(batch.forget, 1.0, self.alpha)).mean()

        if self.order in ("mixed", "paired"):
            return [Phase("relabelled", self.order, relabel)]
        alone: Literal["frozen", "recipe"] = (
            ("frozen" if self.order == "forget-only" else "recipe")
            if self.forget_batch_norm == "auto"
            else self.forget_batch_norm
        )
        forget = Phase("relabelled", "forget", relabel, alone)
        if self.order == "forget-only":
            return [forget]
        return [forget, Phase("retain", "retain", cross_entropy)]
