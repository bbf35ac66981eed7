"""LoTUS: distil the original's answers, smoothed on the forget set until it is as unsure as unseen.

Spartalis et al. 2025, "LoTUS: Large-Scale Machine Unlearning with a Taste of Uncertainty".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.health import measure_accuracies
from letheon.engine.method import Accuracies, Decision, Definition, Method, Phase, Run
from letheon.engine.models.teacher import teacher_output
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Batch
from letheon.methods.distillation import TeacherState, in_fp32, one_hot, require_range


@dataclass
class LotusState(TeacherState):
    """The original model, the temperature of the epoch and the accuracy that is aimed at."""

    temperature: Tensor = field(default_factory=lambda: torch.ones(()))  # 0-dim float64, device
    unseen: float = 0.0


def gumbel_noise(seed: int, epoch: Tensor, index: Tensor, classes: int) -> Tensor:
    """(B, classes) float64 standard Gumbel numbers, a function of (seed, epoch, sample number)."""
    u = uniform(seed, "gumbel", epoch, index, classes)
    return -(-(u + 2.0**-54).log()).log()


@dataclass(frozen=True)
class Lotus(Method):
    """LoTUS: descend -t log p over F and 30 % of R, t from the original's logits z.

    On F, t = softmax((z + Gumbel noise) / tau) with tau = exp(alpha (acc_F - acc_unseen)), measured
    before each epoch (eq. 7 to 9); on R, t is one-hot. acc_unseen is the original's on held-out
    images, and 0 where classes are forgotten. It stops once acc_F is 0.01 below it. Published:
    AdamW 1e-4, 10 epochs for ResNet-18 (1e-6, 3 for ViT), alpha 8 for CIFAR-10, 2 for CIFAR-100,
    Tiny-ImageNet and ImageNet, 32 for classes; what the digits gave is in docs/methods.md. The
    authors' code draws the one-hot target at random instead of taking the largest
    (`retain_target draw`), and its parser's alpha of 1 is used by none of their scripts.
    """

    name: ClassVar[str] = "lotus"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="LoTUS",
        reads="mixed, 30 % of R",
        formula="-t log p, t = Gumbel softmax of z_o, warmer while F is better known than unseen "
        "images",
        cost="4/3; 1/3 of all images an epoch",
        source="Spartalis et al. 2025",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"alpha": (1.0, 64.0)}
    recipe: Recipe = Recipe(epochs=10, lr=1e-4, optimizer="adamw")
    alpha: float = 8.0
    """How fast the temperature grows with the gap in accuracy."""
    retain_share: float = 0.3
    """Share of the retain samples that is read, the same in every epoch."""
    retain_target: Literal["argmax", "draw"] = "argmax"
    """argmax: the original's best class; draw: a class drawn from its probabilities, as published
    code."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(alpha=(self.alpha, 0, inf), retain_share=(self.retain_share, 1e-6, 1))

    def check(self, run: Run) -> None:
        """Refuse single samples without held-out images to aim at."""
        if not run.forget_classes and run.held_out is None:
            raise InputError(
                "got single samples to forget and no held-out images; expected some, whose "
                "accuracy lotus aims at; give a data set with a test split, or forget classes",
                option="forget",
            )

    def prepare(self, run: Run) -> LotusState:
        """Keep the original model and measure its accuracy."""
        accuracies = measure_accuracies(run)
        unseen = 0.0 if run.forget_classes else accuracies.held_out_retain
        assert unseen is not None and accuracies.forget is not None
        tau = torch.tensor(self._temperature(accuracies.forget - unseen), dtype=torch.float64)
        return LotusState(run.teacher(), tau.to(run.ranks.device), unseen)

    def _temperature(self, gap: float) -> float:
        return math.exp(self.alpha * gap)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set and the part of the retain set, shuffled together."""
        assert isinstance(state, LotusState)
        teacher, tau, seed, now = state.teacher, state.temperature, run.seed, run.epoch

        def distil(net: nn.Module, batch: Batch) -> Tensor:
            goal = teacher_output(teacher, batch.images).logits.double()
            noisy = goal + gumbel_noise(seed, now, batch.index, goal.shape[1])
            best = (noisy if self.retain_target == "draw" else goal).argmax(dim=1)
            hard = one_hot(best, goal.shape[1]).double()
            target = torch.where(batch.forget[:, None], (noisy / tau).softmax(dim=1), hard)
            log_probabilities = in_fp32(net(batch.images).logits).log_softmax(dim=1)
            return -(target.to(log_probabilities.dtype) * log_probabilities).sum(dim=1).mean()

        return [Phase("distil", "mixed", distil, retain_share=self.retain_share)]

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        """Cool down as the forget set becomes as hard as unseen images; stop where it is harder."""
        assert isinstance(state, LotusState) and accuracies.forget is not None
        gap = accuracies.forget - state.unseen
        if gap <= -0.01:
            return "stop"
        state.temperature.fill_(self._temperature(gap))
        return "go on"
