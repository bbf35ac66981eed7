"""One-point contraction (OPC): a negative control that pulls forget logits to the origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Kind, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.distillation import in_fp32, require_range, sum_of_halves


@dataclass(frozen=True)
class OnePoint(Method):
    """OPC: descend CE(R) + weight |z(x)|_2 on F, a forget batch beside each retain batch.

    A control: the answers on F become uniform, and similarity measures such as CKA take the
    collapsed features for forgotten ones. Weight 1 is published; epochs and rate are ours, what the
    digits gave is in docs/methods.md. Without full text: our reading.
    """

    name: ClassVar[str] = "one-point-contraction"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="OPC, a negative control",
        reads="paired",
        formula="CE(R) + norm of z over F",
        cost="1, of twice R",
        source="our reading",
    )
    kind: ClassVar[Kind] = "control"
    recipe: Recipe = Recipe(epochs=5, lr=0.01)
    weight: float = 1.0
    """Weight of the length of a forget sample's logits."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(weight=(self.weight, 0, inf))

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set, beside it the forget set."""

        def contract(net: nn.Module, batch: Batch) -> Tensor:
            logits = net(batch.images).logits
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            return sum_of_halves(batch, self.weight * vector_norm(in_fp32(logits), dim=1), losses)

        return [Phase("contract", "paired", contract)]
