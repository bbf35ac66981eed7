"""MUNBa: the Nash bargain between the forget and the retain gradient, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.memory.products import joint_norm
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.paired import half_mean, write_gradient
from letheon.methods.random_label import draw_labels
from letheon.methods.requirements import require_between, require_samples

OPPOSED = 1e-4
"""Length of the sum of two unit gradients below which they are taken for opposite."""


@dataclass(frozen=True)
class Munba(Method):
    """MUNBa: step along alpha_r g_r + alpha_u g_u, the Nash bargaining solution of both gradients.

    g_r is the gradient of the cross-entropy of a retain batch, g_u that of a forget batch on random
    labels. The solution of K alpha = 1 / alpha, K their Gram matrix (Wu and Harandi 2025, "MUNBa:
    Machine Unlearning via Nash Bargaining", theorem on the closed form) is
    alpha_r = 1 / (|g_r| (1 + c)^(1/2)), alpha_u = 1 / (|g_u| (1 + c)^(1/2)), c the cosine between
    them. The joined gradient has length 2^(1/2) always, so a clip at 1 always acts and the step is
    along the sum of the unit gradients. Where they are opposite no step helps both, and none is
    taken; where one is zero the other remains.

    Batch 256 and clip 1 are published. The authors' code writes the same solution with 1e-8 inside
    a quotient of fourth powers, which breaks down for small retain gradients, and falls back to
    L_r + 0.1 L_u; after one pass over the forget set it goes on with retain batches alone. Their
    mask is `salun munba`; their l1 term is left out.
    """

    name: ClassVar[str] = "munba"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="MUNBa",
        reads="paired",
        formula="step along g_r / norm + g_u / norm, the Nash bargain; g_u on random labels",
        cost="2 E N_r g",
        source="Wu and Harandi 2025",
    )
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    clip: float = 1.0
    """Length of the joined gradient at most; 0: as it is, 2^(1/2)."""
    draw: Literal["other", "any"] = "other"
    """Random labels of forget samples. other: never the true one; any: as in the published code."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_between("clip", self.clip)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty."""
        require_samples(run, self.name)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """A forget batch beside each retain batch, their gradients apart."""
        classes = torch.arange(run.model.classes, device=run.ranks.device)

        def losses(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
            drawn = draw_labels(batch, classes, self.draw, run.seed, run.epoch)
            labels = torch.where(batch.forget, drawn, batch.labels)
            each = F.cross_entropy(net(batch.images).logits, labels, reduction="none")
            return {
                "forget": half_mean(each, batch.forget),
                "retain": half_mean(each, ~batch.forget),
            }

        return [Phase("bargain", "paired", losses, parts=("forget", "retain"))]

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Join the two gradients."""
        length = min(self.clip or math.inf, math.sqrt(2))
        parts = run.grad_parts["retain"], run.grad_parts["forget"]
        write_gradient(run, bargain(*parts, length, partial(joint_norm, run)))


def bargain(
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    length: float,
    norm: Callable[[Sequence[Tensor]], Tensor],
) -> list[Tensor]:
    """Sum of the two unit gradients, brought to `length`; zeros where they are opposite.

    `norm` is that of one tensor per parameter as one vector.
    """
    sizes = [norm(grads) for grads in (retain, forget)]
    r, f = (torch.where(size > 0, 1 / size, 0.0) for size in sizes)
    joined = [one * r + other * f for one, other in zip(retain, forget, strict=True)]
    size = norm(joined)
    scale = torch.where(size > OPPOSED, length / size, 0.0)
    return [one * scale for one in joined]
