"""CU, contrastive unlearning: push forget features from their own class to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.distillation import in_fp32, require_range
from letheon.methods.relations import all_rows, count_once, refuse_micro_batches


def contrast(
    forget: Tensor, retain: Tensor, forget_labels: Tensor, retain_labels: Tensor, temperature: float
) -> Tensor:
    """Unlearning contrast of forget rows against retain rows, a scalar.

    For each forget row the mean over the retain rows of other classes of -s, plus the log of the
    sum of exp(s) over the rows of its own class, s being cosines over the temperature. Those of its
    own class are retain rows where the batch has any, else the other forget rows; where there are
    none the row counts zero, and so it does without a retain row of another class.

    Args:
        forget: (m, D) rows of length one; `forget_labels` (m,) int64.
        retain: (n, D) rows of length one; `retain_labels` (n,) int64.
        forget_labels: of `forget`.
        retain_labels: of `retain`.
        temperature: above 0.
    """
    with torch.autocast(forget.device.type, enabled=False):
        to_retain = forget @ retain.T / temperature
        to_forget = forget @ forget.T / temperature
    same = forget_labels[:, None] == retain_labels[None, :]
    self_pairs = torch.eye(len(forget), dtype=torch.bool, device=forget.device)
    siblings = (forget_labels[:, None] == forget_labels[None, :]) & ~self_pairs
    siblings = siblings & ~same.any(dim=1, keepdim=True)
    positive = torch.cat([same, siblings], dim=1)
    scores = torch.cat([to_retain, to_forget], dim=1).masked_fill(~positive, -torch.inf)
    counts = positive.any(dim=1) & ~same.all(dim=1)
    scores = torch.where(counts[:, None], scores, 0)  # a row of -inf alone has no gradient
    other = (~same).sum(dim=1).clamp(min=1)
    away = scores.logsumexp(dim=1) - (to_retain * ~same).sum(dim=1) / other
    return torch.where(counts, away, 0).mean()


@dataclass(frozen=True)
class Contrastive(Method):
    """CU: descend ce_weight CE(R) + contrast_weight C(F, R), a forget batch beside each retain one.

    C pulls the pooled features of a forget sample to the retain samples of other classes and pushes
    them from those of its own (Zhang et al. 2024, "Contrastive Unlearning", eq. 2), tau 0.1, over
    the samples of all ranks. Where a whole class is forgotten none of its samples are retained;
    then the other forget samples of the class stand for them, which is our reading, and so is the
    form of C: no full text. Weights 0.6 and 0.4 are a port's; epochs and rate are ours, what the
    digits gave is in docs/methods.md. The published port (arXiv 2503.06991) contrasts only among
    forget samples, which is nothing for a single class, and ends with the shorter of both sets.
    """

    name: ClassVar[str] = "cu"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="CU, contrastive unlearning",
        reads="paired",
        formula="0.6 CE(R) + 0.4 contrast of f(F) against f(R)",
        cost="1, of twice R",
        source="Zhang et al. 2024, our reading",
    )
    recipe: Recipe = Recipe(epochs=5, lr=0.01)
    ce_weight: float = 0.6
    """Weight of the cross-entropy on the retain set."""
    contrast_weight: float = 0.4
    """Weight of the contrast of forget with retain features."""
    temperature: float = 0.1
    """Divides the cosines of the contrast."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_range(
            ce_weight=(self.ce_weight, 0, inf),
            contrast_weight=(self.contrast_weight, 0, inf),
            temperature=(self.temperature, 1e-3, inf),
        )

    def check(self, run: Run) -> None:
        """Refuse micro-batches, which cannot see all pairs."""
        refuse_micro_batches(run)

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set, beside it the forget set."""
        ranks = run.ranks

        def push(net: nn.Module, batch: Batch) -> Tensor:
            logits, features = net(batch.images)
            half, total = len(batch.labels) // 2, batch.total // 2
            ce = F.cross_entropy(logits[:half], batch.labels[:half])
            rows = F.normalize(in_fp32(features), dim=1)
            retain, forget = (all_rows(part, run, total) for part in rows.split(half))
            kept, gone = (all_rows(part, run, total) for part in batch.labels.split(half))
            away = contrast(forget, retain, gone, kept, self.temperature)
            return self.ce_weight * ce + self.contrast_weight * count_once(away, batch, ranks)

        return [Phase("push", "paired", push)]
