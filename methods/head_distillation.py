"""Head distillation: a negative control that forgets in the last layer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.memory.shards import whole_copy
from letheon.engine.method import Definition, Kind, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.loaders.batch import Batch
from letheon.methods.requirements import require_retained_class


@dataclass
class HeadState(State):
    """The original head."""

    weight: Tensor  # (classes, D)
    bias: Tensor | None  # (classes,)


@dataclass(frozen=True)
class HeadDistillation(Method):
    """HD: teach the last linear layer never to name the forgotten classes; the encoder stays.

    No way to forget, but a control for evaluations (Jeon et al. 2026, arXiv 2405.17878): by its
    answers the model has forgotten, by its features it is the original, bit for bit. The head
    learns the original head's probabilities with the forgotten classes' logits at minus infinity,
    over forget and retain samples alike; batch-norm is frozen.
    """

    name: ClassVar[str] = "head-distillation"
    definition: ClassVar[Definition] = Definition(
        alias="HD, a negative control",
        reads="mixed",
        formula="CE of the head to the original's probabilities without the forgotten classes; the "
        "encoder is frozen",
        cost="1/3",
        source="Jeon et al. 2026",
    )
    kind: ClassVar[Kind] = "control"
    elementwise: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=10, lr=0.1, weight_decay=0.0, batch_norm="frozen")

    def check(self, run: Run) -> None:
        """Refuse a request that names no class to mask."""
        if not run.forget_classes:
            raise InputError(
                "got single samples to forget; head-distillation masks whole classes; "
                "give class:, file:, random: or top:",
                option="forget",
            )
        require_retained_class(run, self.name)

    def prepare(self, run: Run) -> HeadState:
        """Keep the original head, and let nothing else move."""
        head = run.model.head
        run.model.requires_grad_(False)
        head.requires_grad_(True)
        bias = None if head.bias is None else whole_copy(head.bias)
        return HeadState(whole_copy(head.weight), bias)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over both sets, each sample once."""
        assert isinstance(state, HeadState)
        weight, bias = state.weight, state.bias
        gone = torch.zeros(run.model.classes, dtype=torch.bool, device=weight.device)
        gone[list(run.forget_classes)] = True

        def distil(net: nn.Module, batch: Batch) -> Tensor:
            logits, features = net(batch.images)
            with torch.autocast(weight.device.type, enabled=False):
                goal = F.linear(features.detach().to(weight.dtype), weight, bias)  # (B, C)
            goal = goal.masked_fill(gone, -torch.inf).softmax(dim=1)
            return F.cross_entropy(logits, goal)

        return [Phase("distil", "mixed", distil, "frozen")]

    def finish(self, run: Run, state: State) -> None:
        """Let the whole network move again."""
        run.model.requires_grad_(True)
