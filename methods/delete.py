"""DELETE: distil the original's answer without each forget sample's own class.

Zhou et al. 2025, "Decoupled Distillation to Erase".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.models.teacher import teacher_output
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.distillation import TeacherState, divergence, mask_own


@dataclass(frozen=True)
class Delete(Method):
    """DELETE: descend KL(softmax(z_original without own class) || p) on F; R is never read.

    The sample's own logit is set to minus infinity (the authors: -1e10, the same in float32), so
    that the other classes keep their proportions. 20 epochs of SGD with momentum and no decay at
    batch 128 are published, 1e-4 for CIFAR-10 and ResNet-18, 5e-5 for CIFAR-100, Tiny-ImageNet,
    ViT-S and Swin; what the digits gave is in docs/methods.md. The authors freeze batch-norm only
    by an option; with it frozen the digits want a third of the rate.
    """

    name: ClassVar[str] = "delete"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="DELETE",
        reads="forget",
        formula="KL(softmax(z_o without own class), p)",
        cost="4/3",
        source="Zhou et al. 2025",
    )
    recipe: Recipe = Recipe(epochs=20, lr=1e-4, batch_size=128, weight_decay=0.0)
    forget_batch_norm: Literal["frozen", "recipe"] = "frozen"
    """Batch-norm while only forget samples are read; `recipe` is the published default."""

    def prepare(self, run: Run) -> TeacherState:
        """Keep the original model as the teacher."""
        return TeacherState(run.teacher())

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set."""
        assert isinstance(state, TeacherState)
        teacher = state.teacher

        def erase(net: nn.Module, batch: Batch) -> Tensor:
            goal = mask_own(teacher_output(teacher, batch.images).logits, batch.labels)
            return divergence(net(batch.images).logits, goal).mean()

        return [Phase("erase", "forget", erase, self.forget_batch_norm)]
