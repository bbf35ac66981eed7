"""CF-k: fine-tune only the last k layers on the retain set and let the rest stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.methods.distillation import require_range
from letheon.methods.finetune import cross_entropy
from letheon.methods.layers import choose_layers, freeze_others


@dataclass(frozen=True)
class CfK(Method):
    """CF-k, catastrophic forgetting of k layers: descend CE(R) with all but the last k frozen.

    Goel et al. 2022 ("Towards Adversarial Evaluations for Inexact Machine Unlearning"). A layer is
    a weight of two or more dimensions with the vectors after it; batch-norms in the frozen part
    keep their statistics, too. Epochs and rate are fine-tuning's; the choice of k is the user's,
    2 is ours.
    """

    name: ClassVar[str] = "cf-k"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="CF-k",
        reads="retain",
        formula="CE(R), all but the last k layers frozen",
        cost="1/3 to 1",
        source="Goel et al. 2022",
    )
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    k: int = 2
    """Layers from the end that train, the head included."""
    layers: tuple[str, ...] = ()
    """Or the layers by their dotted paths: --layers layer4 fc."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(k=(self.k, 1, inf))

    def check(self, run: Run) -> None:
        """Refuse layers that the network does not have."""
        choose_layers(run, self.layers, self.k)

    def prepare(self, run: Run) -> State:
        """Freeze the other layers."""
        freeze_others(run, choose_layers(run, self.layers, self.k))
        return State()

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        return [Phase("retain", "retain", cross_entropy)]

    def finish(self, run: Run, state: State) -> None:
        """Let the whole network train again."""
        run.model.requires_grad_(True)
