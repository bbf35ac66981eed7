"""The contract of a method: what the loop asks of it, and what it may touch.

A method is a frozen dataclass whose fields are its hyperparameters, in one file of `methods/`.
It holds no state: what it needs between events lives in the `Run`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks
from letheon.engine.gradient_sync import Flat
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.teacher import shared_copy
from letheon.errors import InputError
from letheon.loaders.batch import Batch, Loader, Reads

Loss = Callable[[nn.Module, Batch], Tensor]
"""(net, batch) -> scalar to descend, the mean over this rank's samples. Pure: no host sync."""


@dataclass(frozen=True)
class Phase:
    """One pass over one stream with one loss."""

    name: str  # in records, and the key of the compiled graph: one loss per name in a run
    reads: Reads
    loss: Loss
    batch_norm: Literal["recipe", "frozen"] = "recipe"
    """frozen: running statistics are used and kept, whatever the recipe says. The right choice
    where only forget samples are read, which would otherwise become the statistics."""
    slot: str = "main"
    """Which optimiser steps; each slot has its own momentum."""


@dataclass
class Run:
    """What a method may touch. Everything but `loader` and `ranks` is equal on every rank."""

    model: Classifier  # the network being edited, unwrapped, on the device
    loader: Loader  # the training set, split into forget and retain
    recipe: Recipe
    ranks: Ranks
    seed: int
    forget: Tensor  # (N,) bool on the device: which training samples are to be forgotten
    forget_classes: tuple[int, ...]  # sorted ids; empty when single samples are forgotten
    precision: Precision = field(default_factory=Precision)
    epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """0-dim int64 on the device, set by the loop; a loss reads it without being recompiled."""
    notes: list[str] = field(default_factory=list)
    """What the user is told at the start, such as which loader was chosen; for the first rank."""
    flat: Flat | None = None
    """Weights and gradients as one buffer each, where the run keeps them so; set by the loop."""
    state: dict[str, Any] = field(default_factory=dict)
    """What a method keeps between its events: masks, class means. Never saved."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        compiling = self.precision.compile
        if self.recipe.batch_norm == "sync" and self.ranks.world > 1 and compiling != "off":
            raise InputError(
                f"got --batch-norm sync with --compile {compiling}; its exchange between the ranks "
                "would cut the graph; use --batch-norm local or frozen, or --compile off"
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the model's own listing."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def decide_dtype(self) -> None:
        """Where `--dtype auto` is still open, decide and tell; every rank must call.

        Not while a run is planned, when a rank may already have left on bad input.
        """
        self.precision, line = self.precision.decided(self.model.preset.size, self.ranks)
        if line:
            self.notes.append(line)
            if self.ranks.main:
                print(line, file=sys.stderr)

    def teacher(self) -> Classifier:
        """A frozen copy of the model as it is at the first call (so call it in `prepare`).

        Batch-norm is folded into its convolutions and the weights are in the type of the run's
        autocast, under which it is to be called. Runs of one process that start from the same
        weights have one teacher. Ask it for features by `teacher_features`.
        """
        if "teacher" not in self.state:
            self.state["teacher"] = shared_copy(self.model, self.precision)
        teacher: Classifier = self.state["teacher"]
        return teacher


class Method:
    """One way to forget. Override only what differs; every default does nothing.

    A one-shot method returns no phases and does its work in `prepare`.
    """

    recipe: Recipe
    fresh: ClassVar[bool] = False
    """True for a method that starts from new weights instead of the trained ones."""

    def check(self, run: Run) -> None:
        """Before anything is written, on every rank alone: refuse input that does not fit the run.

        Raises:
            InputError: such as a file that is not there.
        """

    def prepare(self, run: Run) -> None:
        """Once, before compile and DDP: teachers, masks, surgery, one-shot edits of the weights."""

    def epoch(self, run: Run, number: int) -> Sequence[Phase]:
        """The passes of one epoch, in order."""
        return []

    def optimiser(self, run: Run) -> torch.optim.Optimizer:
        """What steps, once for each slot, at its first batch."""
        return run.recipe.optimiser(run.parameters)

    def edit_grads(self, run: Run) -> None:
        """Gradients are unscaled and equal on all ranks; the optimiser has not stepped."""

    def edit_weights(self, run: Run) -> None:
        """The optimiser has stepped."""

    def finish(self, run: Run) -> None:
        """Remove what was added; leave a model of the architecture it had."""
