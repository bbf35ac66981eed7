"""Influence unlearning (IU): one Newton step that undoes the forget set, by empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.checkpoints.sweep_state import Sums
from letheon.engine.distributed import copy_from_first
from letheon.engine.memory.products import sum_parts
from letheon.engine.method import Definition, Method, Run
from letheon.engine.numbers.sample_gradients import SampleGradients
from letheon.engine.numbers.sweep import repeat
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import gradient_sum
from letheon.loaders.batch import Batch
from letheon.methods.finetune import cross_entropy
from letheon.methods.requirements import require_between, require_positive, require_samples


def sample_losses(net: nn.Module, batch: Batch) -> Tensor:
    """(B,) cross-entropy of each sample."""
    return F.cross_entropy(net(batch.images).logits, batch.labels, reduction="none")


def dot(a: Sequence[Tensor], b: Sequence[Tensor], run: Run) -> Tensor:
    """Inner product over all tensors, 0-dim float64: rank 0's, on every rank."""
    products = [(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]
    return copy_from_first(sum_parts(run, torch.stack(products).sum()), run.ranks)


def go_through(sums: Sums, items: Callable[[int], Iterator[int]], rounds: int) -> Iterator[int]:
    """Yield the rounds of a solver that nothing saves."""
    return items(0)


def conjugate_gradients(
    apply: Callable[[list[Tensor]], list[Tensor]],
    goal: list[Tensor],
    steps: int,
    tolerance: float,
    run: Run,
    watch: Callable[[Sums, Callable[[int], Iterator[int]], int], Iterator[int]] = go_through,
) -> list[Tensor]:
    """Solve A x = goal for a symmetric positive A, known by its product with a vector.

    Ends after `steps`, or when the residual is `tolerance` of the goal (Hestenes and Stiefel 1952).
    `apply` may sum over the ranks: all take as many steps as rank 0. `watch` yields the rounds, and
    may save and restore between them what they have come to.
    """
    x = [torch.zeros_like(one) for one in goal]
    residual = [one.clone() for one in goal]
    direction = [one.clone() for one in goal]
    size = dot(residual, residual, run)
    end = size * tolerance**2
    sums = Sums(*x, *residual, *direction, size)

    def rounds(skip: int) -> Iterator[int]:
        for number in range(skip, steps):
            if size <= end:
                return
            yield number

    for _ in watch(sums, rounds, steps):
        image = apply(direction)
        step = float(size / dot(direction, image, run))
        torch._foreach_add_(x, direction, alpha=step)
        torch._foreach_sub_(residual, image, alpha=step)
        before = size.clone()
        size.copy_(dot(residual, residual, run))
        torch._foreach_mul_(direction, float(size / before))
        torch._foreach_add_(direction, residual)
    return x


@dataclass(frozen=True)
class Influence(Method):
    """IU: w + alpha (damping I + F)^(-1) v, F the empirical Fisher over m retain samples.

    v = N_f / N (mean gradient of the forget set - mean gradient of the retain set) of the
    cross-entropy, F = 1/m sum_i g_i g_i^T (Izzo et al. 2021; Jia et al. 2023, eq. 3, with
    WoodFisher, Singh and Alistarh 2020). The inverse is exact: solved by conjugate gradients, each
    product one forward-mode and one reverse-mode pass over the m samples.

    alpha was searched from 1 to 20 and m is 1000 there. Their code (`solver published`) keeps one
    vector of the recursion instead of all gradients, so that it stays parallel to the first
    sample's gradient g and the answer is v - s g for some number s: no inverse. It skips that
    sample, and takes the retain gradient from the forget set on ImageNet.
    """

    name: ClassVar[str] = "influence"
    definition: ClassVar[Definition] = Definition(
        alias="IU, WoodFisher",
        reads="both, once, and m retain samples up to 50 times",
        formula="w + alpha (damping I + F)^(-1) N_f / N (mean gradient of F - of R), by conjugate "
        "gradients",
        cost="N + 100 m g",
        source="Izzo et al. 2021; Jia et al. 2023, eq. 3",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"alpha": (0.01, 20.0)}
    elementwise: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=0)
    alpha: float = 1.0
    """Length of the step; 1 is Newton's."""
    samples: int = 1000
    """m, drawn by the seed from the retain set."""
    damping: float = 1.0
    """Added to the diagonal of the Fisher matrix; the recursion's own start is 1."""
    solver: Literal["exact", "published"] = "exact"
    """exact: conjugate gradients; published: the recursion of the authors' code."""
    steps: int = 50
    """Products at most; with a damping of 1 twenty to fifty are enough."""
    tolerance: float = 1e-6
    """Share of the goal's length at which the solver stops."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for option in ("alpha", "damping", "tolerance"):
            require_positive(option, getattr(self, option))
        for option in ("samples", "steps"):
            require_between(option, getattr(self, option), 1)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves a set empty."""
        require_samples(run, self.name)

    def prepare(self, run: Run) -> State:
        """Take the step."""
        forget, retain = (gradient_sum(run, part, cross_entropy) for part in ("forget", "retain"))
        chosen, total = int(run.forget.sum()), len(run.forget)
        goal = [
            chosen / total * (f / chosen - r / (total - chosen))
            for f, r in zip(forget, retain, strict=True)
        ]
        gradients = SampleGradients(run, "retain", sample_losses, self.samples)
        solve = self._solve if self.solver == "exact" else _recurse
        step = solve(gradients, goal)
        with torch.no_grad():
            for parameter, change in zip(run.parameters, step, strict=True):
                parameter.add_(change, alpha=self.alpha)
        return State()

    def _solve(self, gradients: SampleGradients, goal: list[Tensor]) -> list[Tensor]:
        count = len(gradients.index)

        def apply(vector: list[Tensor]) -> list[Tensor]:
            image = gradients.transposed_times(gradients.times(vector) / count)
            torch._foreach_add_(image, vector, alpha=self.damping)
            return image

        run = gradients.run
        watch = partial(repeat, run, "retain", f"conjugate gradients of {self!r}")
        return conjugate_gradients(apply, goal, self.steps, self.tolerance, run, watch)


def _recurse(gradients: SampleGradients, goal: list[Tensor]) -> list[Tensor]:
    """K and o of the published recursion: o is always c g and k is v - s g, g the first gradient.

    For every later sample: k -= (k.g_i) / (m + o.g_i) o, then o -= (o.g_i) / (m + o.g_i) o. Only
    the products g.g_i and v.g_i are needed.
    """
    first = torch.zeros(len(gradients.index), dtype=torch.float64, device=gradients.index.device)
    first[0] = 1
    start = gradients.transposed_times(first)
    along, through = gradients.times(start).tolist(), gradients.times(goal).tolist()
    count, scale, shift = len(along), 1.0, 0.0
    for own, other in zip(along[1:], through[1:], strict=True):
        share = scale / (count + scale * own)
        shift += (other - shift * own) * share
        scale -= share * scale * own
    return [v - shift * g for v, g in zip(goal, start, strict=True)]
