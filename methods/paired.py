"""What methods over paired batches share: losses over the halves, and when to stop."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks, gather_rows
from letheon.engine.method import Accuracies, Decision, Method, Run
from letheon.loaders.batch import Batch


def half_mean(values: Tensor, members: Tensor) -> Tensor:
    """Mean of (B,) values over one half of a paired batch, `members` (B,) bool.

    Exact on any number of ranks and micro-batches: the halves are of one size in the whole batch.
    """
    return torch.where(members, values, 0.0).mean() * 2


def two_losses(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Mean cross-entropy of the forget and of the retain half, apart."""
    losses = F.cross_entropy(net(batch.images).logits, batch.labels, reduction="none")
    return {
        "forget": half_mean(losses, batch.forget),
        "retain": half_mean(losses, ~batch.forget),
    }


def sum_of_batch(values: Tensor, ranks: Ranks) -> Tensor:
    """Sum of (B,) values over the whole batch, those of the other ranks included, as a constant."""
    return gather_rows(values.detach().sum()[None], ranks, ranks.world).sum()


def write_gradient(run: Run, grads: list[Tensor]) -> None:
    """Make `grads` what the optimizer sees, one tensor per parameter."""
    for parameter, grad in zip(run.parameters, grads, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(grad)


class UntilForgotten(Method):
    """Ends the training once the forget accuracy, a fraction, is below `until`; 0: never."""

    until: float
    reads_accuracies: ClassVar[Literal["all", "forget", "none"]] = "forget"

    @property
    def watches_epochs(self) -> bool:
        """Only where an accuracy ends the training."""
        return self.until > 0

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        """Stop once the forget set is forgotten."""
        forget = accuracies.forget
        return "stop" if forget is not None and forget < self.until else "go on"
