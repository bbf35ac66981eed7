"""DualOptim: an inner method whose forget steps have an optimizer of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Phase, Run
from letheon.errors import InputError
from letheon.methods.requirements import require_between
from letheon.methods.wrapper import Wrapper

SLOT = "dual-forget"


@dataclass(frozen=True)
class DualOptim(Wrapper):
    """DualOptim: forget steps by AdamW with an adaptive rate, retain steps as the inner method's.

    Passes of the inner method that read the forget set alone step through AdamW at `forget_lr`; all
    others keep the inner method's optimizer, and neither sees the other's momentum (Zhong et al.
    2025, "DualOptim: Enhancing Efficacy and Stability in Machine Unlearning with Dual Optimizers").
    The forget rate follows the inner recipe's schedule.

    Weight decay 0.05 is the authors' script's; their rates differ from method to method, and 1e-4
    is ours, never tuned. The variant with AdamW for both is an inner `optimizer
    adamw`.
    """

    name: ClassVar[str] = "dual-optim"
    definition: ClassVar[Definition] = Definition(
        alias="DualOptim",
        reads="as its inner method",
        formula="forget passes through AdamW at a rate of their own, the others as they were",
        cost="as its inner method",
        source="Zhong et al. 2025",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"forget_lr": (1e-6, 1e-2)}
    forget_lr: float = 1e-4
    """Peak rate of the forget steps."""
    forget_decay: float = 0.05
    """AdamW's weight decay in the forget steps."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, and an inner method without passes to tell apart."""
        require_between("forget_lr", self.forget_lr)
        require_between("forget_decay", self.forget_decay)
        if not self.inner.separates_forget:
            raise InputError(
                f"got dual-optim around {self.inner.name}, which reads no forget set in a pass of "
                "its own beside others; expected a method that does, such as scrub, spkd, sfron or "
                "random-label in its order sequential; use one of these",
                option="order" if hasattr(self.inner, "order") else "",
            )

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """The inner method's: AdamW moves each weight by itself."""
        return self.inner.elementwise

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """The inner method's passes, those over the forget set in a slot of their own."""
        return [_apart(phase) for phase in super().phases(run, state, epoch)]

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        """AdamW for the forget steps, else the inner method's."""
        if slot != SLOT:
            return super().optimizer(run, state, slot)
        recipe = replace(run.recipe, optimizer="adamw", weight_decay=self.forget_decay)
        return recipe.build_optimizer(run.parameters)

    def rate(self, run: Run, slot: str, epoch: float) -> float:
        """The forget rate by the recipe's schedule, else the inner method's."""
        if slot != SLOT:
            return super().rate(run, slot, epoch)
        return replace(run.recipe, lr=self.forget_lr).rate(epoch)


def _apart(phase: Phase) -> Phase:
    beside = phase.beside and _apart(phase.beside)
    slot = SLOT if phase.reads == "forget" else phase.slot
    return replace(phase, beside=beside, slot=slot)
