"""Which images of a set are searched, and which ask: the fixed 80/20 split of the k-NN metric.

The split is a function of the number of images and a seed; image i is the i-th in the sorted list
of files, so it is the same on every file system. It is not stratified, as the seed's was not.
`split_files/` holds the files of Office-Home's domains and CUB-200-2011, for use elsewhere; every
other set's can be written with `save`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
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
    rule: str
    seed: int = SEED

    @property
    def n(self) -> int:
        """Images in the set."""
        return len(self.database) + len(self.queries)


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
    return Split(order[:first].sort().values, order[first:].sort().values, rule, seed)


def save(chosen: Split, path: Path) -> None:
    """Write the split as JSON: the queries' positions; the database is all the others."""
    content = {
        "n": chosen.n,
        "rule": chosen.rule,
        "seed": chosen.seed,
        "queries": chosen.queries.tolist(),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    os.replace(partial, path)


def load(path: Path, n: int) -> Split:
    """Read a split of a set of `n` images.

    Raises:
        InputError: a file that is no split, or one of a set of another size.
    """
    try:
        content = json.loads(path.read_text())
        total, queries = int(content["n"]), torch.tensor(content["queries"], dtype=torch.int64)
        rule, seed = str(content["rule"]), int(content["seed"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(
            f"got split file {path} ({problem}); expected JSON with n, rule, seed, queries"
        ) from None
    if total != n:
        raise InputError(
            f"got split file {path} of {total} images for a set of {n}; use that set's own"
        )
    chosen = torch.zeros(n, dtype=torch.bool)
    inside = queries[(queries >= 0) & (queries < n)].unique()
    if len(inside) != len(queries) or not 0 < len(inside) < n:
        raise InputError(
            f"got split file {path} with {len(queries)} queries; expected 1 to {n - 1} different "
            f"numbers in 0..{n - 1}"
        )
    chosen[queries] = True
    return Split((~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0], rule, seed)
