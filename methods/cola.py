"""COLA: collapse the forgotten features by contrasting the retain set, then align the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.distillation import in_fp32, require_range
from letheon.methods.finetune import cross_entropy
from letheon.methods.relations import all_rows, count_once, refuse_micro_batches
from letheon.methods.requirements import require_encoder


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2), a scalar.

    Over the samples that have another of their class beside them; zero where none has.

    Args:
        features: (b, D) with rows of length one.
        labels: (b,) int64.
        temperature: above 0.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    with torch.autocast(features.device.type, enabled=False):
        logits = (features @ features.T / temperature).masked_fill(own, -torch.inf)
    log_probabilities = logits.log_softmax(dim=1).masked_fill(own, 0)
    positive = (labels[:, None] == labels[None, :]) & ~own
    count = positive.sum(dim=1)
    rows = (log_probabilities * positive).sum(dim=1) / count.clamp(min=1)
    return -rows.sum() / (count > 0).sum().clamp(min=1)


@dataclass(frozen=True)
class Cola(Method):
    """COLA: first epochs SupCon(f) on R, which lets the forgotten features collapse; then CE(R).

    Jeon et al. 2026 (arXiv 2405.17878), "collapse and align"; F is never read. No code and no full
    text could be had: one view a sample, the pooled features and all the numbers (temperature 0.1,
    5 epochs of each, rate 0.01) are our reading; what the digits gave is in docs/methods.md. The
    contrast is over the samples of all ranks.
    """

    name: ClassVar[str] = "cola"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="COLA",
        reads="retain",
        formula="SupCon of f over R, then CE(R)",
        cost="1",
        source="Jeon et al. 2026, our reading",
    )
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    collapse_epochs: int | None = None
    """First epochs that contrast features, the others train with cross-entropy; default: half."""
    temperature: float = 0.1
    """Divides the cosines of the contrast."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(
            collapse_epochs=(self._collapse, 0, self.recipe.epochs),
            temperature=(self.temperature, 1e-3, torch.inf),
        )

    @property
    def _collapse(self) -> int:
        epochs = self.collapse_epochs
        return self.recipe.epochs // 2 if epochs is None else epochs

    def check(self, run: Run) -> None:
        """Refuse micro-batches, which cannot see all pairs, and a network of a head alone."""
        refuse_micro_batches(run)
        require_encoder(run, self.name)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        if epoch >= self._collapse:
            return [Phase("align", "retain", cross_entropy)]
        ranks = run.ranks

        def collapse(net: nn.Module, batch: Batch) -> Tensor:
            logits, features = net(batch.images)
            rows = all_rows(F.normalize(in_fp32(features), dim=1), run, batch.total)
            labels = all_rows(batch.labels, run, batch.total)
            loss = count_once(supervised_contrast(rows, labels, self.temperature), batch, ranks)
            return loss + 0 * logits.sum()  # DDP waits for a gradient of every weight

        return [Phase("collapse", "retain", collapse, slot="collapse")]

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        """While features collapse the head rests: its momentum and decay, too."""
        head = {id(run.own_parameter(weight)) for weight in run.model.head.parameters()}
        rest = [p for p in run.parameters if slot != "collapse" or id(p) not in head]
        return run.recipe.build_optimizer(rest)
