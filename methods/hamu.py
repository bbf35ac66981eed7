"""HAMU: the largest fall of one loss under a guaranteed rise of the other, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from letheon.engine.checkpoints.method_state import State
from letheon.engine.memory.products import clip_gradients, norms, sum_parts
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.methods.paired import two_losses, write_gradient
from letheon.methods.requirements import require_between, require_positive, require_samples


def constrained_steps(
    run: Run, objective: Sequence[Tensor], constraint: Sequence[Tensor], ratio: float
) -> list[Tensor]:
    """For each tensor the step of length R that lowers one loss most while another rises by b.

    With gradients g of the objective and h of the constraint, R = |g|, and b its tensor's share of
    `ratio`, in proportion to |g| |h|: (i) -g where that raises the other loss by b already; (ii) b
    h / |h|^2 where R is too short for b; (iii) else b h / |h|^2 and the rest of R against the part
    of g across h.
    """
    pairs = list(zip(objective, constraint, strict=True))
    products = norms(run, objective) * norms(run, constraint)
    total = products.sum()
    budgets = torch.where(total > 0, ratio * products / total, 0.0)
    inner, length, size = (
        sum_parts(run, torch.stack([(a * b).sum() for a, b in of]))
        for of in (pairs, [(g, g) for g, _ in pairs], [(h, h) for _, h in pairs])
    )
    inverse = torch.where(size > 0, 1 / size, 0.0)
    across = [g - inner[k] * inverse[k] * h for k, (g, h) in enumerate(pairs)]
    rest = (length - budgets**2 * inverse).clamp(min=0).sqrt()
    widths = norms(run, across)
    sideways = torch.where(widths > 0, rest / widths, 0.0)
    steps = []
    for k, (g, h) in enumerate(pairs):
        needed = budgets[k] * inverse[k] * h
        steps.append(torch.where(inner[k] <= -budgets[k], -g, needed - sideways[k] * across[k]))
    return steps


@dataclass(frozen=True)
class Hamu(Method):
    """HAMU: per tensor, a step in a trust region that serves one set and guarantees the other.

    With the loss gradients g_r and g_f of a retain and a forget batch, HAMU-Q (`goal quality`)
    lowers the retain loss as far as a step of SGD's own length R = lr |g_r| can while the forget
    loss rises by b, to first order; b is lr times `ratio`, shared over the tensors in proportion to
    |g_r| |g_f|. HAMU-U (`goal unlearning`) raises the forget loss and guarantees the retain loss:
    the same with (-g_f, -g_r). The step is handed to the optimizer as a gradient, minus step / lr.

    Ratio 0.5, clip 1, frozen batch-norm and 25 epochs at 1e-4 with batches of 5000 are the authors'
    CIFAR-10 script for ResNet-20; our rate and batch are others. Our reading, from their code,
    which has four waits for the device for each tensor and step.
    """

    name: ClassVar[str] = "hamu"
    definition: ClassVar[Definition] = Definition(
        alias="HAMU-Q, HAMU-U (goal)",
        reads="paired",
        formula="the step of SGD's length that lowers one loss most while the other rises by b; "
        "our reading",
        cost="2 E N_r g",
        source="its authors' code",
    )
    elementwise: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    goal: Literal["quality", "unlearning"] = "quality"
    """quality: the retain loss is optimized, the forget loss guaranteed; unlearning: reversed."""
    ratio: float = 0.5
    """Guaranteed change of the other loss in a step, in units of the rate."""
    clip: float = 1.0
    """Length of the gradient handed on, at most."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_between("ratio", self.ratio)
        require_positive("clip", self.clip)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty."""
        require_samples(run, self.name)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """A forget batch beside each retain batch, their gradients apart."""
        return [Phase("constrain", "paired", two_losses, "frozen", parts=("forget", "retain"))]

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Join the two gradients."""
        first, second = run.grad_parts["retain"], run.grad_parts["forget"]
        if self.goal == "unlearning":
            first, second = [-one for one in second], [-one for one in first]
        steps = constrained_steps(run, first, second, self.ratio)
        write_gradient(run, [-step for step in steps])
        clip_gradients(run, self.clip)
