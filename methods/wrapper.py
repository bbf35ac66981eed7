"""A method around another: every event is the inner method's, on its own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Accuracies, Decision, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.datasets.image_set import ImageSet


@dataclass
class WrapperState(State):
    """The inner method's own state; a wrapper adds fields of its own."""

    inner: State


@dataclass(frozen=True)
class Wrapper(Method):
    """Base class of methods that change how another one trains; override what differs."""

    inner: Method
    """The method inside: any that wraps none itself."""

    @property
    def recipe(self) -> Recipe:  # type: ignore[override]
        """The inner method's."""
        return self.inner.recipe

    @property
    def from_scratch(self) -> bool:  # type: ignore[override]
        """The inner method's."""
        return self.inner.from_scratch

    def stream_seed(self, seed: int) -> int:
        """The inner method's."""
        return self.inner.stream_seed(seed)

    @property
    def watches_epochs(self) -> bool:
        """The inner method's."""
        return self.inner.watches_epochs

    @property
    def goes_back(self) -> bool:  # type: ignore[override]
        """The inner method's."""
        return self.inner.goes_back

    @property
    def reads_accuracies(self) -> Literal["all", "forget", "none"]:  # type: ignore[override]
        """The inner method's."""
        return self.inner.reads_accuracies

    @property
    def replaces_head(self) -> bool:  # type: ignore[override]
        """The inner method's."""
        return self.inner.replaces_head

    def check(self, run: Run) -> None:
        """As the inner method does."""
        self.inner.check(run)

    def sample_bytes(self, run: Run) -> int:
        """The inner method's."""
        return self.inner.sample_bytes(run)

    def prepare(self, run: Run) -> State:
        """Let the inner method prepare."""
        return WrapperState(self.inner.prepare(run) or State())

    def sources(self, run: Run) -> Mapping[str, ImageSet]:
        """The inner method's."""
        return self.inner.sources(run)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """The inner method's passes."""
        return self.inner.phases(run, inner_state(state), epoch)

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        """The inner method's."""
        return self.inner.optimizer(run, inner_state(state), slot)

    def rate(self, run: Run, slot: str, epoch: float) -> float:
        """The inner method's."""
        return self.inner.rate(run, slot, epoch)

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """The inner method's."""
        self.inner.edit_grads(run, inner_state(state), phase)

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        """The inner method's."""
        self.inner.edit_weights(run, inner_state(state), phase)

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        """The inner method's."""
        return self.inner.after_epoch(run, inner_state(state), accuracies)

    def finish(self, run: Run, state: State) -> None:
        """Let the inner method clean up."""
        self.inner.finish(run, inner_state(state))


def inner_state(state: State) -> State:
    """The inner method's own state."""
    assert isinstance(state, WrapperState)
    return state.inner
