"""Sample rows of a set by key: the same for every model and any number of ranks."""

from __future__ import annotations

from torch import Tensor

from letheon.kernels.keyed import permutation

MOST = 20_000
"""Rows of the forget and of the retain set that the membership attacks read, at most."""


def sample_rows(rows: Tensor, most: int = MOST) -> Tensor:
    """(m,) increasing positions of at most `most` rows with `rows` (n,) bool."""
    places = rows.nonzero()[:, 0]
    return places[permutation(0, "audit", 0, len(places))[:most]].sort().values
