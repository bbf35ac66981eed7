"""One model's outputs on one image set: features, logits, labels and pooled layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """One model's answers to one image set, in sample-index order, on the CPU.

    The same on every rank. Letters: n samples, D features, C classes.
    """

    features: Tensor  # (n, D) float32, the input of the last linear layer
    logits: Tensor  # (n, C) float32
    labels: Tensor  # (n,) int64
    forget: Tensor  # (n,) bool
    index: Tensor  # (n,) int64, strictly increasing
    taps: dict[str, Tensor] = field(default_factory=dict)  # name -> (n, width) float32, pooled

    def __len__(self) -> int:
        return len(self.index)

    def where(self, rows: Tensor) -> Outputs:
        """Select the samples of `rows`: (n,) bool or (m,) increasing positions."""
        taps = {name: values[rows] for name, values in self.taps.items()}
        return Outputs(
            self.features[rows],
            self.logits[rows],
            self.labels[rows],
            self.forget[rows],
            self.index[rows],
            taps,
        )
