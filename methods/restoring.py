"""What the distillations of arXiv 2503.06991 share: forget in one pass, restore in the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Method, Phase, Run
from letheon.engine.models.classifier import Output
from letheon.engine.models.teacher import teacher_output
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.distillation import TeacherState, require_range
from letheon.methods.grad_ascent import ASCENTS
from letheon.methods.pseudo_label import pseudo_label_loss
from letheon.methods.requirements import require_retained_class


@dataclass(frozen=True)
class Restoring(Method):
    """Each epoch forgets on F, then descends ce_weight CE + kd_weight KD on R.

    What KD compares between the network and the original is `distance` of a subclass.
    """

    separates_forget: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=15, lr=1e-5, batch_size=128)
    ce_weight: float = 10.0
    """Weight of the cross-entropy on the retain set."""
    kd_weight: float = 10.0
    """Weight of the distillation on the retain set."""
    forget_pass: Literal["ascent", "bounded-ascent", "pseudo-label"] = "ascent"
    """ascent: minus the cross-entropy (GA_ in the published code); bounded-ascent: each sample's up
    to ln C; pseudo-label: the original's best class that is kept (its PL_ names)."""
    optimizers: Literal["shared", "separate"] = "shared"
    """shared: the forget pass's momentum runs on into the restoring pass, as published."""
    forget_batch_norm: Literal["frozen", "recipe"] = "recipe"
    """Batch-norm in the forget pass; the restoring pass sets its statistics right again."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(ce_weight=(self.ce_weight, 0, inf), kd_weight=(self.kd_weight, 0, inf))

    def distance(self, output: Output, goal: Output, batch: Batch, run: Run) -> Tensor:
        """Scalar to descend, zero where the network answers as the original."""
        raise NotImplementedError

    def check(self, run: Run) -> None:
        """Refuse a request of all classes where the forget pass wants a label."""
        if self.forget_pass == "pseudo-label":
            require_retained_class(run, f"{self.name} with the forget pass pseudo-label")

    def prepare(self, run: Run) -> TeacherState:
        """Keep the original model as the teacher."""
        return TeacherState(run.teacher())

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """The forget set, then the retain set."""
        assert isinstance(state, TeacherState)
        teacher = state.teacher

        def restore(net: nn.Module, batch: Batch) -> Tensor:
            goal = teacher_output(teacher, batch.images)
            output = net(batch.images)
            ce = F.cross_entropy(output.logits, batch.labels)
            kd = self.distance(output, goal, batch, run)
            return self.ce_weight * ce + self.kd_weight * kd

        if self.forget_pass == "pseudo-label":
            loss = pseudo_label_loss(run, teacher)
        else:
            loss = ASCENTS["unbounded" if self.forget_pass == "ascent" else "bounded"]
        slot = "main" if self.optimizers == "shared" else "forget"
        return [
            Phase(self.forget_pass, "forget", loss, self.forget_batch_norm, slot),
            Phase("restore", "retain", restore),
        ]
