"""PCGrad: where forget and retain gradient conflict, each loses its part along the other."""

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
from letheon.methods.paired import two_losses, write_gradient
from letheon.methods.requirements import require_between, require_samples


def product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product of two gradients over all parameters, 0-dim float64."""
    parts = [(x.double() * y.double()).sum() for x, y in zip(left, right, strict=True)]
    return torch.stack(parts).sum()


@dataclass(frozen=True)
class PcGrad(Method):
    """PCGrad: descend CE(R) and -CE(F), each gradient freed of what opposes the other.

    With g_r the gradient of the retain loss and g_f that of minus the forget loss, over all weights
    as one vector: where g_r . g_f < 0, g_r loses its part along g_f and g_f its part along g_r,
    both by the old values; the step is along `weight` times their sum (Yu et al. 2020, "Gradient
    Surgery for Multi-Task Learning", algorithm 1, for two tasks). A baseline of unlearning papers;
    the one code of these that we could read halves the sum (weight 0.5). `gdr-gma` does the same
    tensor by tensor and weighs the two. No rate is published for it: fine-tuning's is ours, and it
    was never run beyond its tests.
    """

    name: ClassVar[str] = "pcgrad"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="PCGrad",
        reads="paired",
        formula="g_r + g_f, each freed of its part against the other, all weights as one vector",
        cost="2 E N_r g",
        source="Yu et al. 2020, alg. 1",
    )
    recipe: Recipe = Recipe(epochs=10, lr=1e-3)
    weight: float = 1.0
    """Factor of the sum."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_between("weight", self.weight)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty."""
        require_samples(run, self.name)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """A forget batch beside each retain batch, their gradients apart."""

        def losses(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
            both = two_losses(net, batch)
            return {"forget": -both["forget"], "retain": both["retain"]}

        return [Phase("surgery", "paired", losses, parts=("forget", "retain"))]

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Free each gradient of the other where they conflict, and add them."""
        retain, forget = run.grad_parts["retain"], run.grad_parts["forget"]
        pairs = [(retain, forget), (retain, retain), (forget, forget)]
        inner, *sizes = sum_parts(run, torch.stack([product(*pair) for pair in pairs])).unbind()
        conflict = inner.clamp(max=0)  # 0-dim; 0 where there is none
        r, f = (
            1 - conflict / size.clamp(min=1e-300) for size in sizes
        )  # what g_r and g_f are multiplied by in all
        joined = [
            self.weight * (r.to(a.dtype) * a + f.to(a.dtype) * b)
            for a, b in zip(retain, forget, strict=True)
        ]
        write_gradient(run, joined)
