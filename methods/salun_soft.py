"""SalUn-soft: random labels with the change of the weights soft-thresholded after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from letheon.engine.checkpoints.method_state import State
from letheon.engine.memory.products import kth_smallest
from letheon.engine.method import Definition, Phase, Run
from letheon.methods.distillation import require_range
from letheon.methods.random_label import RandomLabel, RandomLabelState


@dataclass
class SalunSoftState(RandomLabelState):
    """What labels are drawn from, where the weights come from, and the steps so far."""

    start: list[Tensor] = field(default_factory=list)  # by parameter
    epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))  # of `start`
    steps: int = 0
    total: int = field(default=1)  # steps of the whole run


@dataclass(frozen=True)
class SalUnSoft(RandomLabel):
    """SalUn-soft: random-label; after step t, w = w_0 + S_s(w - w_0), S_s the soft threshold.

    S_s(d) = sign(d) max(|d| - s, 0); s is the r-th smallest |d| of all weights, r = density (1 -
    t / T) n: at first most of a step is taken back, at last nothing (Fan et al. 2024, appendix).
    Labels, order, epochs and rate are random-label's. The authors' code takes w_0 anew at each
    epoch (`origin epoch`), lets t stand within an epoch where both sets are mixed, and reads a
    setting that its parser does not have.
    """

    name: ClassVar[str] = "salun-soft"
    definition: ClassVar[Definition] = Definition(
        alias="SalUn-soft, RL proximal",
        reads="as random-label",
        formula="as random-label; after each step the change of the weights is soft-thresholded",
        cost="1 and a selection a step",
        source="Fan et al. 2024",
    )
    elementwise: ClassVar[bool] = True
    density: float = 0.5
    """Share of the weights whose change is taken back after the first step."""
    origin: Literal["start", "epoch"] = "start"
    """What the change is counted from: the weights at the start of the run, or of the epoch (the
    published code)."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        require_range(density=(self.density, 0, 1))

    def prepare(self, run: Run) -> SalunSoftState:
        """Keep the weights and count the steps to come."""
        classes = super().prepare(run).classes
        start = [p.detach().clone() for p in run.parameters]
        state = SalunSoftState(classes, start, torch.zeros_like(run.epoch))
        passes = self.phases(run, state, 0)
        epoch = sum(run.loader.steps(phase.stream) for phase in passes)
        state.total = max(1, epoch * self.recipe.epochs)
        return state

    @torch.no_grad()
    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Before the first step of an epoch, count the steps anew, and the change where asked."""
        assert isinstance(state, SalunSoftState)
        # Steps that were left out for numbers that are not finite count from the next epoch on.
        before = run.epoch_number * (state.total // self.recipe.epochs)
        state.steps = max(state.steps, before)
        if self.origin == "epoch":  # decided on the device: a step that is taken back takes it back
            for start, weight in zip(state.start, run.parameters, strict=True):
                start.copy_(torch.where(run.epoch > state.epoch, weight, start))
            state.epoch.copy_(run.epoch)

    @torch.no_grad()
    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        """Take back the smallest changes, and shorten the others by the largest of these."""
        assert isinstance(state, SalunSoftState)
        weights = [p.detach() for p in run.parameters]
        away = torch._foreach_sub(weights, state.start)
        state.steps += 1
        count = sum(run.whole_shape(p).numel() for p in run.parameters)
        rank = int(self.density * (1 - state.steps / state.total) * count)
        if rank:
            threshold = kth_smallest(run, [change.abs() for change in away], rank)
            for weight, start, change in zip(weights, state.start, away, strict=True):
                weight.copy_(start + change.sign() * (change.abs() - threshold).clamp(min=0))
