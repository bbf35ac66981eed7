"""Weight distortion, attenuation and dropout: disturb all weights, then fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.kernels import keyed
from letheon.kernels.keyed import uniform
from letheon.methods.distillation import require_range
from letheon.methods.finetune import cross_entropy

CHUNK = 1 << 22  # numbers drawn at once


def normal(seed: int, stream: str, count: int, device: torch.device) -> Tensor:
    """(count,) float64 standard normal numbers, a function of (seed, stream) on every device."""
    parts = []
    for index in torch.arange(count, device=device).split(CHUNK):
        parts.append(keyed.normal(seed, stream, 0, index, 1)[:, 0])
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class WeightDistortion(Method):
    """Disturb every weight once, then descend CE(R): against relearning of what is forgotten.

    `noise`: w + amount N(0, 1); `attenuate`: amount w; `drop`: zero with probability amount. From a
    published study of resistance to relearning, whose full text we could not read: the
    definitions are its code's, our reading. That code has amounts 0.02, 0.5 and 0.2 and 100 epochs
    of fine-tuning at 1e-5; epochs and rate here are fine-tuning's (on the digits:
    docs/methods.md).
    """

    name: ClassVar[str] = "weight-distortion"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="weight distortion, attenuation, dropout",
        reads="retain",
        formula="CE(R), after noise on, a factor on, or zeros in all weights",
        cost="1",
        source="a study of relearning, our reading of its code",
    )
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    disturb: Literal["noise", "attenuate", "drop"] = "noise"
    """noise: added; attenuate: a factor; drop: zeros."""
    amount: float | None = None
    """Strength; default: 0.02, 0.5 or 0.2, as published."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.amount is not None:
            require_range(amount=(self.amount, 0, inf if self.disturb == "noise" else 1))

    @torch.no_grad()
    def prepare(self, run: Run) -> State:
        """Disturb the weights, the same way on every rank."""
        published = {"noise": 0.02, "attenuate": 0.5, "drop": 0.2}
        amount = published[self.disturb] if self.amount is None else self.amount
        for name, parameter in run.named_parameters.items():
            whole, device = run.whole_shape(parameter), parameter.device
            stream, n = f"disturb {name}", whole.numel()
            if self.disturb == "noise":
                draws = run.own_part(normal(run.seed, stream, n, device).view(whole))
                parameter.add_((amount * draws).to(parameter.dtype))
            elif self.disturb == "attenuate":
                parameter.mul_(amount)
            else:
                draws = uniform(run.seed, stream, 0, torch.arange(n, device=device), 1)
                parameter.mul_(run.own_part(draws.view(whole)) >= amount)
        return State()

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        return [Phase("retain", "retain", cross_entropy)]
