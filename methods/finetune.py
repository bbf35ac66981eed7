"""Fine-tuning: cross-entropy on the retain set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch


def cross_entropy(net: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the batch against its labels, a share of them spread evenly."""
    return F.cross_entropy(net(batch.images).logits, batch.labels, label_smoothing=smoothing)


@dataclass(frozen=True)
class Finetune(Method):
    """FT: go on training on the retain set and let the rest fade (Warnecke et al. 2021)."""

    name: ClassVar[str] = "finetune"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="FT",
        reads="retain",
        formula="CE(R)",
        cost="1",
        source="Warnecke et al. 2021",
    )
    recipe: Recipe = Recipe(epochs=10, lr=0.01)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        return [Phase("retain", "retain", cross_entropy)]
