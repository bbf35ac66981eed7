"""Pseudo-label (PL): forget samples learn the original's next best class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.teacher import teacher_output
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.distillation import TeacherState, class_mask, mask_own
from letheon.methods.requirements import require_retained_class


def pseudo_label_loss(run: Run, teacher: Classifier) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy to the teacher's best class that is not to be forgotten.

    Where single samples are forgotten, it is the best class other than the sample's own.
    """
    gone, by_class = class_mask(run), bool(run.forget_classes)

    def relabel(net: nn.Module, batch: Batch) -> Tensor:
        goal = teacher_output(teacher, batch.images).logits
        goal = goal.masked_fill(gone, -torch.inf) if by_class else mask_own(goal, batch.labels)
        return F.cross_entropy(net(batch.images).logits, goal.argmax(dim=1))

    return relabel


@dataclass(frozen=True)
class PseudoLabel(Method):
    """PL: descend CE(p, argmax over kept classes of z_original) on F; R is never read.

    The baseline of arXiv 2503.06991, whose code is as the definition and by class alone; for
    single samples the own class is left out instead, which is our reading. No rate is published
    for it: 5 epochs at 1e-4 are ours; what the digits gave is in docs/methods.md.
    """

    name: ClassVar[str] = "pseudo-label"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="PL",
        reads="forget",
        formula="CE(p, best kept class of z_o)",
        cost="4/3",
        source="Rethinking Unlearning for Transfer Learning, code",
    )
    recipe: Recipe = Recipe(epochs=5, lr=1e-4)
    forget_batch_norm: Literal["frozen", "recipe"] = "frozen"
    """Batch-norm while only forget samples are read; the published code has `recipe`."""

    def check(self, run: Run) -> None:
        """Refuse a request of all classes, which leaves no label."""
        require_retained_class(run, self.name)

    def prepare(self, run: Run) -> TeacherState:
        """Keep the original model as the teacher."""
        return TeacherState(run.teacher())

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set."""
        assert isinstance(state, TeacherState)
        loss = pseudo_label_loss(run, state.teacher)
        return [Phase("relabel", "forget", loss, self.forget_batch_norm)]
