"""Sample rows of a set by key: the same for every model and any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from letheon.kernels.keyed import permutation

MOST = 20_000
"""Rows of the forget and of the retain set that the membership attacks read, at most."""


def sample_rows(rows: Tensor, most: int = MOST) -> Tensor:
    """(m,) increasing positions of at most `most` rows with `rows` (n,) bool."""
    places = rows.nonzero()[:, 0]
    return places[permutation(0, "audit", 0, len(places))[:most]].sort().values


def stratified_halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Divide rows into two halves of the same classes, by key: whatever the order of the set.

    Every second row would do for a set in random order alone: in one whose classes alternate, or
    whose images do within a class, the halves would differ in more than chance. A class of an odd
    number gives its last row to either half in turn.

    Args:
        labels: (n,) int64.

    Returns:
        (n - n // 2,) and (n // 2,) increasing positions, a function of n and the labels.
    """
    order = permutation(0, "halves", 0, len(labels))
    order = order[torch.argsort(labels[order], stable=True)]
    return order[::2].sort().values, order[1::2].sort().values
