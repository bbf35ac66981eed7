"""NegGrad+: descend on the retain set and ascend on the forget set in one joint loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.distillation import require_range, sum_of_halves


@dataclass(frozen=True)
class NegGradPlus(Method):
    """NegGrad+: descend alpha CE(R) - (1 - alpha) CE(F), a forget batch beside each retain batch.

    Kurmanji et al. 2023 (the baseline of SCRUB, section 4). SGD at 0.01 without momentum and decay
    and alpha between 0.95 and 0.9999 are published with their code; 5 epochs are ours, and too few
    on the digits (docs/methods.md). The authors' code cycles one pass over the forget set, so that
    its batches and their augmentation come again unchanged; here each turn has a new order and new
    views.
    """

    name: ClassVar[str] = "neg-grad-plus"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="NegGrad+",
        reads="paired",
        formula="alpha CE(R) - (1 - alpha) CE(F)",
        cost="1, of twice R",
        source="Kurmanji et al. 2023",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"alpha": (0.5, 0.9999)}
    recipe: Recipe = Recipe(epochs=5, lr=0.01, momentum=0.0, weight_decay=0.0)
    alpha: float = 0.95
    """Weight of the retain set's loss; 1 - alpha is that of the ascent."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(alpha=(self.alpha, 0, 1))

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set, beside it the forget set."""

        def joint(net: nn.Module, batch: Batch) -> Tensor:
            losses = F.cross_entropy(net(batch.images).logits, batch.labels, reduction="none")
            return sum_of_halves(batch, (self.alpha - 1) * losses, self.alpha * losses)

        return [Phase("joint", "paired", joint)]
