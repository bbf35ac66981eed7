"""SFRon: adaptive ascent on the forget set under a Fisher mask, between steps on the retain set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.memory.products import clip_gradients
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import squared_gradient_sum
from letheon.loaders.batch import Batch
from letheon.methods.finetune import cross_entropy
from letheon.methods.influence import sample_losses
from letheon.methods.paired import sum_of_batch
from letheon.methods.relations import refuse_micro_batches
from letheon.methods.requirements import (
    require_between,
    require_positive,
    require_samples,
)


@dataclass
class SfronState(State):
    """Which weights the ascent may use, and how far it has come."""

    masks: list[Tensor]  # bool, one per parameter
    length: int  # ascents of the whole run
    steps: int = 0  # taken so far


@dataclass(frozen=True)
class Sfron(Method):
    """SFRon: retain steps, and after the first of every k one ascent on a weighted forget batch.

    The ascent's gradient is -alpha_t m sum_i w_i dCE_i, w_i = CE_i^(-lambda) / sum_j CE_j^(-lambda)
    over the batch, so that samples that are forgotten already count less; alpha_t = alpha (1 +
    cos(pi t / T)) / 2 over the run; m = [F_f / F_r >= threshold] compares the diagonal Fisher
    information of the two sets at the start, each sample's own gradient squared (Huang et al. 2024,
    "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement"). Its length is
    clipped.

    Published for CIFAR: k 5, alpha 25, lambda 0.5, clip 7, rate 0.01, cosine, 1500 retain steps,
    which are 8.5 epochs at batch 256; for Tiny-ImageNet and Swin-T AdamW at 2e-5, 500 steps, k 1,
    alpha 500, lambda 0.6. In the authors' code the Fisher information is of batch means
    (`fisher batch`), one momentum serves both objectives (`optimizers shared`), and the running
    average of the weights has a factor of 1 and does nothing; it is left out here (`ema` is one). A
    forget step precedes its retain step there.
    """

    name: ClassVar[str] = "sfron"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="SFRon",
        reads="retain; forget beside every k-th",
        formula="CE(R); and ascent on sum of w_i CE_i, masked by F_f / F_r, its weight falling by "
        "a cosine",
        cost="E N_r (1 + 1/k) + N g",
        source="Huang et al. 2024",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"alpha": (1.0, 500.0)}
    separates_forget: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=9, lr=0.01, schedule="cosine")
    alpha: float = 25.0
    """Weight of the first ascent."""
    power: float = 0.5
    """lambda: how much less a sample of high loss counts."""
    every: int = 5
    """k: retain steps for one ascent."""
    threshold: float = 1.0
    """Least F_f / F_r of a weight that the ascent may use."""
    clip: float = 7.0
    """Length of the ascent's gradient, at most."""
    fisher: Literal["sample", "batch"] = "sample"
    """sample: by definition; batch: of batch means, as published."""
    optimizers: Literal["separate", "shared"] = "separate"
    """separate: the ascent has a momentum of its own; shared: as published."""
    forget_batch_norm: Literal["frozen", "recipe"] = "frozen"
    """Batch-norm in the ascent; the published code has `recipe`."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for option in ("alpha", "power", "threshold"):
            require_between(option, getattr(self, option))
        require_between("every", self.every, 1)
        require_positive("clip", self.clip)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty, and micro-batches."""
        require_samples(run, self.name)
        refuse_micro_batches(run)
        refuse_micro_batches(run, reads="forget")

    def prepare(self, run: Run) -> SfronState:
        """Compare the Fisher information of the two sets."""
        count = int(run.forget.sum())
        forget, retain = (
            squared_gradient_sum(run, part, cross_entropy, self.fisher)
            for part in ("forget", "retain")
        )
        ratio = self.threshold * count / (len(run.forget) - count)
        masks = [f >= ratio * r for f, r in zip(forget, retain, strict=True)]
        length = -(-run.loader.steps("retain") // self.every) * run.recipe.epochs
        return SfronState(masks, length)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """The retain set, and beside it the ascent."""

        def ascend(net: nn.Module, batch: Batch) -> Tensor:
            losses = sample_losses(net, batch)
            weights = losses.detach().clamp(min=1e-6) ** -self.power
            weights = weights * (batch.total / sum_of_batch(weights, run.ranks))
            return -(weights * losses).mean()

        slot = "forget" if self.optimizers == "separate" else "main"
        climb = Phase("ascend", "forget", ascend, self.forget_batch_norm, slot)
        return [Phase("retain", "retain", cross_entropy, beside=climb, every=self.every)]

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Weigh, mask and clip the ascent."""
        if phase.name != "ascend":
            return
        assert isinstance(state, SfronState)
        # Steps that were left out for numbers that are not finite count from the next epoch on.
        before = run.epoch_number * (state.length // run.recipe.epochs)
        state.steps = max(state.steps, before)
        weight = self.alpha * (1 + math.cos(math.pi * state.steps / state.length)) / 2
        state.steps += 1
        for parameter, mask in zip(run.parameters, state.masks, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(mask * weight)
        clip_gradients(run, self.clip)
