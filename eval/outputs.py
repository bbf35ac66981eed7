"""One model's outputs on one image set: features, logits, labels and pooled layers, by ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows
from letheon.eval.inference.sampling import MOST, sample_rows


@dataclass(frozen=True)
class Outputs:
    """This rank's share of one model's answers to one image set, in sample-index order, on the CPU.

    The shares follow one another: row i of rank r is position `span()[0]` + i of the set, and the
    ranks' rows in rank order are in index order. With one rank they are the whole set. Nothing here
    gathers a whole table: what metrics need over all ranks are sums, numbers of each sample, or
    some rows. Letters: n samples of this rank, D features, C classes.
    """

    features: Tensor  # (n, D) float32, the input of the last linear layer
    logits: Tensor  # (n, C) float32
    labels: Tensor  # (n,) int64
    forget: Tensor  # (n,) bool
    index: Tensor  # (n,) int64, strictly increasing
    taps: dict[str, Tensor] = field(default_factory=dict)  # name -> (n, width) float32, pooled
    ranks: Ranks = field(default_factory=Ranks)  # the job, whose other ranks hold the other rows

    def __len__(self) -> int:
        return len(self.index)

    def where(self, rows: Tensor) -> Outputs:
        """Select samples of this rank by `rows`: (n,) bool or (m,) increasing positions."""
        taps = {name: values[rows] for name, values in self.taps.items()}
        return Outputs(
            self.features[rows],
            self.logits[rows],
            self.labels[rows],
            self.forget[rows],
            self.index[rows],
            taps,
            self.ranks,
        )

    def span(self) -> tuple[int, int]:
        """Count the samples of the ranks before this one, and of all; every rank must call."""
        counts = self.gather(torch.tensor([len(self)]))
        return int(counts[: self.ranks.rank].sum()), int(counts.sum())

    def gather(self, values: Tensor) -> Tensor:
        """Gather (m, ...) values of some of the samples over the ranks; every rank must call.

        For one number a sample, or few rows: the result is on every rank.
        """
        return gather_rows(values, self.ranks)

    def local_rows(self, places: Tensor) -> Tensor:
        """Find which rows of this rank stand at `places` of the set; every rank must call.

        Args:
            places: (m,) int64 increasing positions over all ranks, the same on every rank.

        Returns:
            (k,) int64 rows of this rank, k <= m.
        """
        start, _ = self.span()
        return places[(places >= start) & (places < start + len(self))] - start

    def sample(self, rows: Tensor, most: int = MOST) -> Tensor:
        """(k,) rows of this rank among at most `most` samples that all ranks draw by key.

        Which samples these are does not depend on the number of ranks; every rank must call.

        Args:
            rows: (n,) bool of this rank: the samples to draw from.
            most: over all ranks.
        """
        return self.local_rows(sample_rows(self.gather(rows), most))
