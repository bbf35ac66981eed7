"""Fine-tuning and retraining: cross-entropy on the retain set, from old weights or new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.method import Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch


def cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch against its labels."""
    return F.cross_entropy(net(batch.images).logits, batch.labels)


@dataclass(frozen=True)
class Finetune(Method):
    """FT: go on training on the retain set and let the rest fade (Warnecke et al. 2021)."""

    recipe: Recipe = Recipe(epochs=10, lr=0.01)

    def epoch(self, run: Run, number: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        return [Phase("retain", "retain", cross_entropy)]


@dataclass(frozen=True)
class Retrain(Method):
    """Train a new network on the retain set alone: the reference every other method is held to."""

    recipe: Recipe = Recipe(epochs=182, lr=0.1, schedule="cosine")
    fresh: ClassVar[bool] = True

    def epoch(self, run: Run, number: int) -> Sequence[Phase]:
        """One pass over the retain set."""
        return [Phase("retain", "retain", cross_entropy)]
