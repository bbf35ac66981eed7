"""NoT: negate the first layer's weights, then fine-tune on the retain set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.methods.finetune import cross_entropy
from letheon.methods.layers import layers_by_name, split_layers


@dataclass(frozen=True)
class WeightNegation(Method):
    """NoT: w = -w in the first layer, then descend CE(R).

    Khalil et al. 2025, "NoT: Federated Unlearning via Weight Negation". Only weights of two or more
    dimensions change their sign, biases and batch-norm do not: our reading, without full text or
    code. The paper's recipe is fine-tuning's, and so are epochs and rate here; what the digits
    gave is in docs/methods.md.
    """

    name: ClassVar[str] = "not"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="NoT",
        reads="retain",
        formula="CE(R), after w = -w in the first layer",
        cost="1",
        source="Khalil et al. 2025, our reading",
    )
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    layers: tuple[str, ...] = ()
    """Dotted paths of the layers to negate; default: the first one."""

    def _names(self, run: Run) -> list[str]:
        return layers_by_name(run, self.layers) if self.layers else split_layers(run)[0]

    def check(self, run: Run) -> None:
        """Refuse layers that the network does not have."""
        self._names(run)

    @torch.no_grad()
    def prepare(self, run: Run) -> State:
        """Negate."""
        for name in self._names(run):
            parameter = run.named_parameters[name]
            if parameter.dim() > 1:
                parameter.neg_()
        return State()

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        return [Phase("retain", "retain", cross_entropy)]
