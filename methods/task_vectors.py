"""Task vectors: learn what is to be forgotten, and subtract it; and NegMerge, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.methods.finetune import cross_entropy
from letheon.methods.requirements import require_between, require_positive, require_samples


@dataclass
class VectorState(State):
    """The original weights, and what the fine-tunings so far add up to."""

    start: list[Tensor]  # one per parameter
    total: list[Tensor]  # sum of the task vectors
    signs: list[Tensor]  # sum of their signs, in the type of the weights
    merged: int = 0  # fine-tunings whose change is in the sums


@dataclass(frozen=True)
class TaskVector(Method):
    """Negated task vectors: w_o - scale tau, tau the change by fine-tuning on the forget set.

    w_o is trained on the forget set with its true labels; the change is subtracted (Ilharco et al.
    2023, "Editing Models with Task Arithmetic", section 3). Batch-norm is frozen. No retain sample
    is read. scale is chosen on validation data there; 1 is ours.
    """

    name: ClassVar[str] = "task-vector"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="task vectors",
        reads="forget",
        formula="w - scale (what learning F changes)",
        cost="E N_f g",
        source="Ilharco et al. 2023",
    )
    recipe: Recipe = Recipe(epochs=5, lr=0.001)
    scale: float = 1.0
    """lambda, how often the change is subtracted."""

    @property
    def multiples(self) -> tuple[float, ...]:
        """Rate of each fine-tuning, in units of the recipe's."""
        return (1.0,)

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_between("scale", self.scale)
        if not self.multiples or self.recipe.epochs % len(self.multiples):
            raise InputError(
                f"got {self.recipe.epochs} epochs for {len(self.multiples)} fine-tunings; expected "
                "as many for each; give a multiple",
                option="epochs",
            )
        if self.recipe.ema:
            raise InputError(
                f"got an ema of {self.recipe.ema}; {self.name} starts anew from the original "
                "weights, which an average would mix in; expected 0",
                option="ema",
            )

    def check(self, run: Run) -> None:
        """Refuse a request without a forget sample."""
        require_samples(run, self.name, retain=False)

    def prepare(self, run: Run) -> VectorState:
        """Keep the original weights."""
        start = [parameter.detach().clone() for parameter in run.parameters]
        total, signs = ([torch.zeros_like(one) for one in start] for _ in range(2))
        return VectorState(start, total, signs)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set; each fine-tuning has an optimizer of its own."""
        number = epoch * len(self.multiples) // run.recipe.epochs
        return [Phase("learn", "forget", cross_entropy, "frozen", f"vector {number}")]

    def rate(self, run: Run, slot: str, epoch: float) -> float:
        """The recipe's over each fine-tuning anew, times its multiple."""
        number, count = int(slot.split()[1]), len(self.multiples)
        start = number * run.recipe.epochs / count
        return self.multiples[number] * run.recipe.rate((epoch - start) * count)

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        """A new one for each fine-tuning, which starts once the one before it is merged."""
        assert isinstance(state, VectorState)
        if int(slot.split()[1]) > state.merged:
            self._merge(run, state)
        return super().optimizer(run, state, slot)

    @torch.no_grad()
    def _merge(self, run: Run, state: VectorState) -> None:
        """Add the change of a fine-tuning to the sums and return to the original weights."""
        change = [now - start for now, start in zip(run.parameters, state.start, strict=True)]
        torch._foreach_add_(state.total, change)
        torch._foreach_add_(state.signs, torch._foreach_sign(change))
        for parameter, start in zip(run.parameters, state.start, strict=True):
            parameter.copy_(start)
        state.merged += 1

    def finish(self, run: Run, state: State) -> None:
        """Merge the last change; subtract the mean change, where all changes have one sign."""
        assert isinstance(state, VectorState)
        self._merge(run, state)
        count = len(self.multiples)
        with torch.no_grad():
            for weight, total, signs in zip(run.parameters, state.total, state.signs, strict=True):
                merged = torch.where(signs.abs() == count, total / count, 0.0)
                weight.sub_(self.scale * merged)


@dataclass(frozen=True)
class NegMerge(TaskVector):
    """NegMerge: subtract the mean of several task vectors, where all of them have one sign.

    The forget set is learned several times from the original weights, each time with another rate;
    entries whose sign differs between the changes are left out (Kim et al. 2024, "NegMerge:
    Consensual Weight Negation for Strong Machine Unlearning"). The authors vary augmentation and
    other settings, too, over up to 30 models; our reading, no code was at hand. The epochs are
    divided among the fine-tunings; a schedule runs over each.
    """

    name: ClassVar[str] = "negmerge"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="NegMerge",
        reads="forget",
        formula="as task-vector, with the mean of several changes where all have one sign; our "
        "reading",
        cost="E N_f g",
        source="Kim et al. 2024",
    )
    recipe: Recipe = Recipe(epochs=15, lr=0.001)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Rate of each fine-tuning, in units of `lr`."""

    @property
    def multiples(self) -> tuple[float, ...]:
        """Rate of each fine-tuning, in units of the recipe's."""
        return self.rates

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        for rate in self.rates:
            require_positive("rates", rate)
