"""Boundary Expanding: the forget set learns a class of its own, which is then cut off.

Chen et al. 2023, "Boundary Unlearning".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.memory.sharding import whole_network
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Batch


@dataclass(frozen=True)
class BoundaryExpanding(Method):
    """Boundary Expanding: descend CE(p, class C) on F, of a head with one class more; R is unread.

    Section 4.2 of the paper: class C + 1 is a shadow class; at the end its row is dropped from the
    head. The row starts as a linear layer's does, drawn from the seed. SGD at 1e-5 with momentum
    and no decay, batch 64 and 10 epochs are published; what the digits gave is in docs/methods.md.
    A well known port never drops the row, which leaves a model of C + 1 classes. It cannot be the
    inner method of salun, whose mask does not fit the wider head.
    """

    name: ClassVar[str] = "boundary-expanding"
    definition: ClassVar[Definition] = Definition(
        alias="Boundary Expanding",
        reads="forget",
        formula="CE(p, a class more), whose row is then dropped",
        cost="1",
        source="Chen et al. 2023",
    )
    elementwise: ClassVar[bool] = True
    replaces_head: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=10, lr=1e-5, batch_size=64, weight_decay=0.0)
    forget_batch_norm: Literal["frozen", "recipe"] = "frozen"
    """Batch-norm while only forget samples are read; the published code has `recipe`."""

    def prepare(self, run: Run) -> State:
        """Add a row to the head."""
        with whole_network(run) as model:
            head = model.head
            width = head.in_features
            columns = torch.arange(width + 1, device=head.weight.device)
            draws = uniform(run.seed, "boundary-expanding", 0, columns, 1)[:, 0]
            row = ((2 * draws - 1) / width**0.5).to(head.weight.dtype)  # (D + 1,)
            head.weight = nn.Parameter(torch.cat([head.weight.detach(), row[None, :width]]))
            if head.bias is not None:
                head.bias = nn.Parameter(torch.cat([head.bias.detach(), row[width:]]))
            head.out_features += 1
        return State()

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set."""
        shadow = run.model.head.out_features - 1

        def expand(net: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(net(batch.images).logits, torch.full_like(batch.labels, shadow))

        return [Phase("expand", "forget", expand, self.forget_batch_norm)]

    def finish(self, run: Run, state: State) -> None:
        """Drop the row."""
        with whole_network(run) as model:
            head = model.head
            head.weight = nn.Parameter(head.weight.detach()[:-1].clone())
            if head.bias is not None:
                head.bias = nn.Parameter(head.bias.detach()[:-1].clone())
            head.out_features -= 1
