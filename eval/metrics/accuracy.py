"""Top-1 accuracy as whole numbers: how many were right, of how many.

FA and RA are measured on training images under the test transform, TFA and TRA on held-out ones
(Jia et al. 2023; Fan et al. 2024). Nothing is averaged over batches, so no batch size, padding or
number of ranks enters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from letheon.errors import InputError
from letheon.eval.inference.extract import Outputs


class Count(NamedTuple):
    """`correct` of `total` samples."""

    correct: int
    total: int

    @property
    def share(self) -> float | None:
        """Between 0 and 1; None where there are no samples."""
        return self.correct / self.total if self.total else None


def _right(outputs: Outputs) -> Tensor:
    """(n,) bool: the largest logit is the label's (the first of equal ones counts as largest)."""
    parts = [part.max(dim=1) for part in outputs.logits.split(8192)]  # NaN where a row has any
    broken = sum(int(part.values.isnan().sum()) for part in parts)
    if broken:
        raise InputError(
            f"got NaN logits for {broken} of {len(outputs)} samples; expected numbers; "
            "the model has diverged: lower its learning rate"
        )
    if len(outputs) == 0:
        return torch.zeros(0, dtype=torch.bool)
    return torch.cat([part.indices for part in parts]) == outputs.labels


def top1(outputs: Outputs, where: Tensor | None = None) -> Count:
    """Top-1 over the samples with `where` (n,) bool; default all.

    Raises:
        InputError: logits that are not numbers.
    """
    right = _right(outputs)
    chosen = torch.ones_like(right) if where is None else where
    return Count(int((right & chosen).sum()), int(chosen.sum()))


def per_class(outputs: Outputs, classes: int, where: Tensor | None = None) -> list[Count]:
    """Top-1 of each true class, in class order; a class without samples has total 0."""
    right = _right(outputs)
    chosen = torch.ones_like(right) if where is None else where
    correct = torch.bincount(outputs.labels[right & chosen], minlength=classes)
    total = torch.bincount(outputs.labels[chosen], minlength=classes)
    return [Count(*pair) for pair in zip(correct.tolist(), total.tolist(), strict=True)]


def forgetting(train: Outputs, test: Outputs) -> dict[str, Count]:
    """FA, RA on the training set, TFA, TRA on the test set."""
    return {
        "FA": top1(train, train.forget),
        "RA": top1(train, ~train.forget),
        "TFA": top1(test, test.forget),
        "TRA": top1(test, ~test.forget),
    }
