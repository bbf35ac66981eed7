"""Ordinary training on the whole training set, through the same loop: the original model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from letheon.engine.method import Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.methods.finetune import cross_entropy


@dataclass(frozen=True)
class Train(Method):
    """Train a new network on everything, forget and retain set alike."""

    recipe: Recipe = Recipe(epochs=182, lr=0.1, schedule="cosine")
    fresh: ClassVar[bool] = True

    def epoch(self, run: Run, number: int) -> Sequence[Phase]:
        """One pass over the whole training set."""
        return [Phase("all", "mixed", cross_entropy)]
