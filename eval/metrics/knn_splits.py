"""Which images of a set are searched, and which ask: the fixed 80/20 split of the k-NN metric.

The split is a function of the number of images and a seed; image i is the i-th in the sorted list
of files, so it is the same on every file system. It is not stratified, as the seed's was not.
`split_files/` holds the queries of Office-Home's domains and CUB-200-2011, for use elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from letheon.errors import InputError
from letheon.kernels.keyed import permutation

Rule = Literal["keyed", "legacy"]
"""How the images are drawn.

- ``keyed``: the order of splitmix64 keys of (seed, image number): the same in any language.
- ``legacy``: torch's own generator with that seed, as `random_split` of the seed's code draws;
  depends on torch's implementation.
"""

SEED = 2
SHARE = 0.8


@dataclass(frozen=True)
class Split:
    """Positions of one set's images: `database` is searched, `queries` ask; both increasing."""

    database: Tensor  # (int(share * n),) int64
    queries: Tensor  # (the rest,) int64


def split(n: int, rule: Rule = "keyed", seed: int = SEED, share: float = SHARE) -> Split:
    """Draw int(share * n) of n images as the database; the others are queries.

    Raises:
        InputError: a set too small to have both.
    """
    first = int(share * n)
    if first < 1 or first >= n:
        raise InputError(f"got a set of {n} images; a database and queries need at least 2")
    if rule == "legacy":
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    else:
        order = permutation(seed, "knn-split", 0, n)
    return Split(order[:first].sort().values, order[first:].sort().values)
