"""Gradient ascent on the forget set (Thudi et al. 2022, "Unrolling SGD"; the field's GA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.finetune import cross_entropy


def ascent(net: nn.Module, batch: Batch) -> Tensor:
    """Minus the mean cross-entropy: descending it raises the loss on the batch."""
    return -cross_entropy(net, batch)


@dataclass(frozen=True)
class GradAscent(Method):
    """GA: climb the loss of the forget set; the retain set is never read.

    Unbounded by nature: a rate a little too high destroys the network. The seed's rate on
    ImageNet is 5e-6 for 8 epochs, the field's on CIFAR-10 1e-4 for 5.
    """

    name: ClassVar[str] = "grad-ascent"
    recipe: Recipe = Recipe(epochs=5, lr=1e-4)
    forget_batch_norm: Literal["frozen", "recipe"] = "frozen"
    """Batch-norm while only forget samples are read; the seed's code has `recipe`, which turns
    the running statistics into those of the forgotten classes."""

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set."""
        return [Phase("ascend", "forget", ascent, self.forget_batch_norm)]
