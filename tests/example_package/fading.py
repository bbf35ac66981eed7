"""Fading: a method outside Letheon, with an option, a state and a search range of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch


@dataclass
class Memory(State):
    """How many steps were taken, and a running mean of the weights."""

    steps: int
    mean: list[Tensor]


@dataclass(frozen=True)
class Fading(Method):
    """Fine-tune on all images, the forget images under the next class's label, and fade the weights
    toward their own running mean after each step."""  # noqa: D205, D209

    name: ClassVar[str] = "fading"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"fade": (0.001, 0.1)}
    recipe: Recipe = Recipe(epochs=2, lr=0.01)
    fade: float = 0.01
    """Share of the way to the running mean, at each step."""

    def prepare(self, run: Run) -> State:
        """Start the mean at the weights."""
        return Memory(0, [parameter.detach().clone() for parameter in run.parameters])

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over all images."""
        return [Phase("fading", "mixed", _loss)]

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        """Fade, with a bias that falls with the steps."""
        assert isinstance(state, Memory)
        state.steps += 1
        with torch.no_grad():
            for parameter, mean in zip(run.parameters, state.mean, strict=True):
                mean.lerp_(parameter, 1 / (state.steps + 1))
                parameter.lerp_(mean, self.fade)


def _loss(net: nn.Module, batch: Batch) -> Tensor:
    logits = net(batch.images).logits
    moved = (batch.labels + 1) % logits.shape[1]
    return F.cross_entropy(logits, torch.where(batch.forget, moved, batch.labels))
