"""Bad Teacher: distil an untrained network on the forget set, the original on a part of the rest.

Chundawat et al. 2023, "Can Bad Teaching Induce Forgetting?".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.initial import fresh_seed, require_resets
from letheon.engine.models.teacher import teacher_output
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.distillation import TeacherState, divergence, require_range


@dataclass
class BadTeacherState(TeacherState):
    """The original model, and an untrained one."""

    untrained: Classifier = rebuilt()


@dataclass(frozen=True)
class BadTeacher(Method):
    """Bad-T: descend KL(p_untrained || p) on F and KL(p_original || p) on 30 % of R, one pass.

    Equation 1 of the paper, both teachers frozen; the retain samples are one random draw, the same
    in every epoch. Batch 256, Adam at 1e-4, temperature 1, one epoch and 30 % are published; what
    the digits gave is in docs/methods.md. The authors' code takes the mean of the
    divergence over all elements, which divides it by the number of classes (`reduction element`);
    Adam hardly notices, SGD does. The untrained network is that which retraining starts from.
    """

    name: ClassVar[str] = "bad-teacher"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="Bad-T",
        reads="mixed, 30 % of R",
        formula="KL to an untrained network on F, to o on R",
        cost="5/3",
        source="Chundawat et al. 2023, eq. 1",
    )
    recipe: Recipe = Recipe(epochs=1, lr=1e-4, optimizer="adamw", weight_decay=0.0)
    retain_share: float = 0.3
    """Share of the retain samples that is read."""
    temperature: float = 1.0
    """Divides the logits of both models before their divergence."""
    reduction: Literal["sample", "element"] = "sample"
    """sample: the mean over samples of the divergence; element: over samples and classes, as the
    published code."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(
            retain_share=(self.retain_share, 1e-6, 1), temperature=(self.temperature, 1e-3, inf)
        )

    def check(self, run: Run) -> None:
        """Refuse a network whose weights cannot be drawn anew."""
        require_resets(run.model)

    def prepare(self, run: Run) -> BadTeacherState:
        """Keep the original model and draw the untrained one."""
        return BadTeacherState(run.teacher(), run.untrained_teacher(fresh_seed(run.seed)))

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set and the part of the retain set, shuffled together."""
        assert isinstance(state, BadTeacherState)
        teacher, untrained = state.teacher, state.untrained

        def teach(net: nn.Module, batch: Batch) -> Tensor:
            good = teacher_output(teacher, batch.images).logits
            bad = teacher_output(untrained, batch.images).logits
            goal = torch.where(batch.forget[:, None], bad, good)
            loss = divergence(net(batch.images).logits, goal, self.temperature).mean()
            return loss / goal.shape[1] if self.reduction == "element" else loss

        return [Phase("teach", "mixed", teach, retain_share=self.retain_share)]
