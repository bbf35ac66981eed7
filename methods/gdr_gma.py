"""GDR-GMA: rectify the directions of two gradients that conflict, and balance their magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.memory.products import sum_parts
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.paired import sum_of_batch, two_losses, write_gradient
from letheon.methods.relations import refuse_micro_batches
from letheon.methods.requirements import (
    require_between,
    require_positive,
    require_samples,
)


def without(x: Tensor, y: Tensor, inner: Tensor, size: Tensor) -> Tensor:
    """X without its part along y, by x . y and y . y; x itself where y is zero."""
    return x - torch.where(size > 0, inner / size, 0.0) * y


@dataclass(frozen=True)
class GdrGma(Method):
    """GDR-GMA: descend (1 - s) g_r + s g_f, each freed of what opposes the other.

    g_r is the gradient of the retain loss L_r, g_f that of minus the forget loss. Tensor by tensor,
    where g_r . g_f < 0, g_r loses its part along g_f and g_f its part along g_r, both by the old
    values (direction rectification). s = 1 / (1 + exp(gamma (L_r - epsilon))): while the retain
    loss is above epsilon, retaining goes first (magnitude adjustment; Lin et al. 2024).

    AdamW at 1e-4, batch 256, 10 epochs, gamma 100 and epsilon 0.02 are published. Our reading, from
    the authors' code: there the second projection uses the first one's result with the old product,
    and a memory of past forget directions is filled for the last tensor alone; it is left out here.
    Their pass ends with the shorter set.
    """

    name: ClassVar[str] = "gdr-gma"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="GDR-GMA",
        reads="paired",
        formula="(1 - s) g_r + s g_f, each freed of its part against the other, tensor by tensor; "
        "our reading",
        cost="2 E N_r g",
        source="Lin et al. 2024",
    )
    recipe: Recipe = Recipe(epochs=10, lr=1e-4, optimizer="adamw")
    gamma: float = 100.0
    """How sharply the balance turns."""
    epsilon: float = 0.02
    """Retain loss at which both have equal weight."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_positive("gamma", self.gamma)
        require_between("epsilon", self.epsilon)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty, and micro-batches."""
        require_samples(run, self.name)
        refuse_micro_batches(run)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """A forget batch beside each retain batch, their gradients apart."""

        def losses(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
            both = two_losses(net, batch)
            rows = both["retain"].expand(len(batch.labels))  # a mean over ranks, by their samples
            retain = sum_of_batch(rows, run.ranks) / batch.total
            share = torch.sigmoid(self.gamma * (self.epsilon - retain))
            return {"forget": -share * both["forget"], "retain": (1 - share) * both["retain"]}

        return [Phase("rectify", "paired", losses, parts=("forget", "retain"))]

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Rectify the two gradients; their weights, which change no direction, are in the loss."""
        pairs = [*zip(run.grad_parts["retain"], run.grad_parts["forget"], strict=True)]
        own = [torch.stack([(r * f).sum(), (r * r).sum(), (f * f).sum()]) for r, f in pairs]
        joined = []
        for (r, f), products in zip(pairs, sum_parts(run, torch.stack(own)), strict=True):
            inner, rr, ff = products.unbind()
            freed = without(r, f, inner, ff) + without(f, r, inner, rr)
            joined.append(torch.where(inner < 0, freed, r + f))
        write_gradient(run, joined)
