"""Weight-distance regularization: fine-tune while moving away from the original weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.memory.products import sum_parts
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.methods.distillation import require_range
from letheon.methods.finetune import cross_entropy


@dataclass
class WeightDistanceState(State):
    """The weights that the run started from."""

    start: list[Tensor] = rebuilt()  # by parameter


@dataclass(frozen=True)
class WeightDistance(Method):
    """Descend CE(R) - alpha sqrt(mean (w - w_original)^2 + 1e-8): against relearning.

    The mean goes over all weights. From a published study of resistance to relearning, whose full
    text we could not read: the definition is its code's (`weight_dist_reg`), our reading. That
    code has alpha 1 and 100 epochs at 1e-5 and keeps the original in train mode; epochs and rate
    here are fine-tuning's, with which the digits do not forget (docs/methods.md). The term enters
    as its gradient, after the reduction over ranks; the recorded loss is the cross-entropy alone.
    """

    name: ClassVar[str] = "weight-distance"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="weight_dist_reg",
        reads="retain",
        formula="CE(R) - alpha sqrt(mean (w - w_o)^2 + 1e-8)",
        cost="1",
        source="a study of relearning, our reading of its code",
    )
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    alpha: float = 1.0
    """Weight of the distance."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(alpha=(self.alpha, 0, inf))

    def prepare(self, run: Run) -> WeightDistanceState:
        """Keep the original weights."""
        return WeightDistanceState([p.detach().clone() for p in run.parameters])

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        return [Phase("retain", "retain", cross_entropy)]

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Subtract the gradient of the distance; the same on every rank."""
        assert isinstance(state, WeightDistanceState)
        away = torch._foreach_sub([p.detach() for p in run.parameters], state.start)
        count = sum(p.numel() for p in run.model.parameters() if p.requires_grad)  # of the whole
        squares = torch.stack([norm.square() for norm in torch._foreach_norm(away)]).sum()
        squares = sum_parts(run, squares)
        root = (squares / count + 1e-8).sqrt()
        torch._foreach_mul_(away, self.alpha / (count * root))
        for parameter, pull in zip(run.parameters, away, strict=True):
            if parameter.grad is not None:
                parameter.grad -= pull
