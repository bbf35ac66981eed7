"""Retraining: a new network that never sees the forget set, and what makes training fast.

Smaller images first, smoothed labels, batch-norm without decay: the schedule of ffcv-imagenet
(Leclerc et al. 2023), whose presets are in `launch/recipes/`. All off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Kind, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.kernels.keyed import hash_keys
from letheon.loaders.batch import Reads
from letheon.methods.finetune import cross_entropy


@dataclass(frozen=True)
class FromScratch(Method):
    """Cross-entropy from new weights; `Train` and `Retrain` say what is read."""

    recipe: Recipe = Recipe(epochs=182, lr=0.1, schedule="cosine")
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes."""
    sizes: tuple[int, ...] = ()
    """Pixels to train at, one after another; default: the model's own, which it is tested at."""
    grow_at: tuple[int, ...] = ()
    """First epoch of each size after the first: --sizes 160 192 --grow-at 12."""
    decay_norms: bool = True
    """Decay biases and batch-norm too, as the field's codes do. LARS never does."""
    from_scratch: ClassVar[bool] = True
    reads: ClassVar[Reads]

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"got label smoothing {self.label_smoothing}; expected 0 or more, below 1"
            )
        if self.sizes and min(self.sizes) < 8:
            raise InputError(f"got sizes {self.sizes}; expected 8 pixels or more")
        if len(self.grow_at) != max(0, len(self.sizes) - 1):
            raise InputError(
                f"got {len(self.sizes)} sizes and {len(self.grow_at)} epochs to grow at; expected "
                "one epoch for each size after the first"
            )
        if list(self.grow_at) != sorted(set(self.grow_at)) or min(self.grow_at, default=1) < 1:
            raise InputError(f"got grow-at {self.grow_at}; expected rising epochs from 1 on")

    def size(self, epoch: int) -> int | None:
        """Pixels of an epoch; None for the model's own."""
        return self.sizes[sum(epoch >= at for at in self.grow_at)] if self.sizes else None

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass at the size of this epoch; each size is a phase, so that each has its graph."""
        size = self.size(epoch)
        name: str = "all" if self.reads == "mixed" else self.reads
        if size is not None:
            name += f" {size} px"
        loss = partial(cross_entropy, smoothing=self.label_smoothing)
        return [Phase(name, self.reads, loss, image_size=size)]

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        """The recipe's, with tensors of one dimension in a group without decay where asked for."""
        optimizer = run.recipe.build_optimizer(run.parameters)
        if not self.decay_norms:
            (group,) = optimizer.param_groups
            flat = [p for p in group["params"] if p.dim() < 2]
            group["params"] = [p for p in group["params"] if p.dim() > 1]
            optimizer.add_param_group({"params": flat, "weight_decay": 0.0})
        return optimizer


@dataclass(frozen=True)
class Retrain(FromScratch):
    """Train a new network on the retain set alone: the reference every other method is held to.

    Its first weights, order and augmentation are drawn from a stream of their own: with those of
    the original model of the same seed it would be nearly the original (on small digits the cosine
    of both networks' weights was 0.98), and every distance to it would flatter.
    """

    share_seed: bool = False
    """Draw first weights, order and augmentation as training with the same seed does."""
    name: ClassVar[str] = "retrain"
    kind: ClassVar[Kind] = "reference"
    reads: ClassVar[Reads] = "retain"

    def stream_seed(self, seed: int) -> int:
        """The seed itself where it is shared, else a number of 31 bits keyed by it."""
        if self.share_seed:
            return seed
        key = hash_keys(seed, "retrain", 0, torch.zeros(1, dtype=torch.int64), 1)
        return int(key[0, 0]) & (2**31 - 1)
