"""SCRUB and SCRUB+R: a student that leaves its teacher on the forget set alone.

Kurmanji et al. 2023, "Towards Unbounded Machine Unlearning".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Accuracies, BackTo, Decision, Definition, Method, Phase, Run
from letheon.engine.models.teacher import teacher_output
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.loaders.batch import Batch
from letheon.methods.distillation import TeacherState, divergence, require_range


@dataclass
class ScrubState(TeacherState):
    """The original model, and the accuracy on the forget set after each epoch."""

    accuracy: Tensor = field(default_factory=lambda: torch.empty(0))  # (epochs,) float64, NaN ahead


@dataclass(frozen=True)
class Scrub(Method):
    """SCRUB: max KL(original || p) over F for the first epochs, min gamma CE + alpha KL over R.

    Each of the first `max_epochs` epochs is a pass that climbs KL_T(p_original || p) over the
    forget set (eq. 3); every epoch then descends gamma CE + alpha KL_T over the retain set (eq. 2).
    KL is at temperature T, times T^2. With `rewind` (SCRUB+R, section 3.2) the weights go back to
    the epoch whose error on the forget set is nearest to the last epoch's error on held-out
    images of the same classes (of all classes where samples are forgotten).

    Published for CIFAR-10, ResNet-18: the defaults; small sets: Adam with decay 0.1 in its gradient
    (`adamw` decays beside it), alpha 0.5, gamma 1, T 2, max_epochs 3, 10 epochs. With batch-norm
    frozen in the climb the digits collapse even at a tenth of the rate (docs/methods.md). The
    authors' rates fall at epochs 3, 5 and 9, here by `schedule`. A port takes one step an epoch,
    because its optimizer stands outside the loop; another has T = 1 and 200 steps.
    """

    name: ClassVar[str] = "scrub"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="SCRUB, SCRUB+R (rewind)",
        reads="forget, then retain",
        formula="-KL_T(p_o, p) over F in the first epochs; gamma CE + alpha KL_T over R",
        cost="4/3; rewind: 1/3 of all images an epoch",
        source="Kurmanji et al. 2023, eq. 2, 3",
    )
    recipe: Recipe = Recipe(epochs=3, lr=5e-4, batch_size=128)
    alpha: float = 0.001
    """Weight of the divergence on the retain set."""
    gamma: float = 0.99
    """Weight of the cross-entropy on the retain set."""
    temperature: float = 4.0
    """Divides the logits of both models before their divergence."""
    max_epochs: int = 2
    """First epochs that climb the divergence on the forget set."""
    forget_batch_size: int = 32
    """Samples of a global batch of the climb; it sets how many steps that has."""
    rewind: bool = False
    """SCRUB+R: go back to the epoch whose forget error is that of unseen images."""
    forget_batch_norm: Literal["frozen", "recipe"] = "recipe"
    """Batch-norm in the climb; the pass over the retain set sets its statistics right again."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(
            alpha=(self.alpha, 0, inf),
            gamma=(self.gamma, 0, inf),
            temperature=(self.temperature, 1e-3, inf),
            max_epochs=(self.max_epochs, 0, inf),
            forget_batch_size=(self.forget_batch_size, 1, inf),
        )

    def check(self, run: Run) -> None:
        """Refuse to rewind without held-out images to compare with."""
        if self.rewind and run.held_out is None:
            raise InputError(
                "got rewind without held-out images; expected some, whose error says where to go "
                "back to; give a data set with a test split, or leave rewind out",
                option="rewind",
            )

    @property
    def separates_forget(self) -> bool:  # type: ignore[override]
        """As long as the climb lasts."""
        return self.max_epochs > 0

    @property
    def watches_epochs(self) -> bool:
        """Only to rewind."""
        return self.rewind

    @property
    def goes_back(self) -> bool:  # type: ignore[override]
        """Only to rewind."""
        return self.rewind

    def prepare(self, run: Run) -> ScrubState:
        """Keep the original model as the teacher."""
        accuracy = torch.full((self.recipe.epochs,), torch.nan, dtype=torch.float64)
        return ScrubState(run.teacher(), accuracy)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """The climb over the forget set, as long as it lasts, then the retain set."""
        assert isinstance(state, ScrubState)
        teacher = state.teacher

        def apart(net: nn.Module, batch: Batch) -> Tensor:
            goal = teacher_output(teacher, batch.images).logits
            return -divergence(net(batch.images).logits, goal, self.temperature).mean()

        def beside(net: nn.Module, batch: Batch) -> Tensor:
            goal = teacher_output(teacher, batch.images).logits
            logits = net(batch.images).logits
            ce = F.cross_entropy(logits, batch.labels)
            return self.gamma * ce + self.alpha * divergence(logits, goal, self.temperature).mean()

        descend = Phase("descend", "retain", beside)
        if epoch >= self.max_epochs:
            return [descend]
        size = self.forget_batch_size
        climb = Phase("climb", "forget", apart, self.forget_batch_norm, batch_size=size)
        return [climb, descend]

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        """After the last epoch, back to the one whose forget error is nearest to the unseen one."""
        assert isinstance(state, ScrubState) and accuracies.forget is not None
        state.accuracy[run.epoch_number] = accuracies.forget
        if run.epoch_number < self.recipe.epochs - 1:
            return "go on"
        unseen = accuracies.held_out_forget if run.forget_classes else None
        unseen = accuracies.held_out_retain if unseen is None else unseen
        assert unseen is not None
        nearest = (state.accuracy - unseen).abs()
        epoch = int((nearest == nearest.min()).nonzero()[-1])  # of equals the one trained longest
        return "go on" if epoch == run.epoch_number else BackTo(epoch)
