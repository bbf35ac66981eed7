"""Several runs of one method against several retrained models: what U-LiRA and its kin read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from letheon.errors import NotMeasurable
from letheon.eval.inference.passes import Passes
from letheon.eval.membership.sides import select_logits
from letheon.eval.membership.signals import gather_signal, margin

T = TypeVar("T")
LEAST = 3
"""Models of each kind."""
_SAMPLED = 2_000  # forget images, at most


def margins(model: Passes) -> Tensor:
    """(n,) float64 margins of the sampled forget images, the same images for every model.

    They are on every rank, all of which must call.
    """
    train = model.outputs["train"]
    rows = train.sample(train.forget, _SAMPLED)
    return gather_signal(select_logits(train, rows), margin)


@dataclass(frozen=True)
class Runs:
    """Models that differ by the seed alone."""

    margins: Sequence[Tensor]  # (n,) `margins` of each
    accuracies: Mapping[str, float | None]  # RA and TRA, means over the models

    def accuracy(self, key: str) -> float:
        """One of the mean accuracies.

        Raises:
            NotMeasurable: it is not known.
        """
        value = self.accuracies.get(key)
        if value is None:
            raise NotMeasurable(f"got no {key}: no samples")
        return value


@dataclass(frozen=True)
class SeveralRuns:
    """The runs of a method and the retrained models: what metrics of the stage "runs" read."""

    unlearned: Runs
    retrained: Runs
    own: Tensor | None = None  # (n,) margins of the model whose row this is
    original: Sequence[Tensor] = ()  # (n,) margins of each original model
    _results: dict[Callable[[SeveralRuns], Any], Any] = field(default_factory=dict, repr=False)

    def once(self, compute: Callable[[SeveralRuns], T]) -> T:
        """Compute something that several metrics share, the first time only."""
        if compute not in self._results:
            self._results[compute] = compute(self)
        result: T = self._results[compute]
        return result

    @property
    def margins(self) -> tuple[Tensor, Tensor]:
        """(K, n) of K unlearned and (L, n) of L retrained models.

        Raises:
            NotMeasurable: fewer than `LEAST` of a kind.
        """
        counts = len(self.unlearned.margins), len(self.retrained.margins)
        if min(counts) < LEAST:
            raise NotMeasurable(
                f"got {counts[0]} runs of this method and {counts[1]} retrained models; "
                f"needs {LEAST} of each, with different seeds"
            )
        return torch.stack([*self.unlearned.margins]), torch.stack([*self.retrained.margins])
