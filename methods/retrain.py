"""Retraining: a new network that never sees the forget set, and what makes training fast.

Smaller images first, smoothed labels, batch-norm without decay: the schedule of ffcv-imagenet
(Leclerc et al. 2023). A whitening first layer, rates of their own for biases and head: those of
Jordan 2024 for CIFAR-10 (docs/retrain.md). All off by default but the whitening, which comes with
the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Kind, Method, Phase, Run
from letheon.engine.models.initial import fresh_seed
from letheon.engine.models.speed_cnn import WhiteningConv2d
from letheon.engine.numbers.sweep import Part
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import patch_moments
from letheon.errors import InputError
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
    bias_rate: float = 1.0
    """Rate of biases and batch-norm, as a multiple of lr."""
    head_rate: float = 1.0
    """Rate of the last linear layer's weight, as a multiple of lr."""
    whitening_images: int = 5000
    """Images whose patches make a whitening layer, where the network has one: drawn by the seed
    from those that are trained on."""
    from_scratch: ClassVar[bool] = True
    reads: ClassVar[Reads]

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"got label smoothing {self.label_smoothing}; expected 0 or more, below 1"
            )
        for name in ("bias_rate", "head_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(
                    f"got {name.replace('_', ' ')} {value}; expected a finite number of 0 or more",
                    option=name,
                )
        if self.whitening_images < 1:
            raise InputError(
                f"got {self.whitening_images} whitening images; expected 1 or more",
                option="whitening_images",
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

    def check(self, run: Run) -> None:
        """Refuse to split a network over the ranks whose first layer is written as a whole."""
        if run.splits and any(isinstance(m, WhiteningConv2d) for m in run.model.net.modules()):
            raise InputError(
                f"got {run.model.name} with reduce shard; its whitening layer is written as a "
                "whole; use reduce auto for so small a network",
                option="reduce",
            )

    def prepare(self, run: Run) -> State:
        """Make the whitening layer, where there is one, from images that will be trained on."""
        part: Part = "all" if self.reads == "mixed" else "retain"
        for layer in run.model.net.modules():
            if isinstance(layer, WhiteningConv2d):
                layer.whiten(*patch_moments(run, part, 2, self.whitening_images))
        return State()

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass at the size of this epoch; each size is a phase, so that each has its graph."""
        size = self.size(epoch)
        name: str = "all" if self.reads == "mixed" else self.reads
        if size is not None:
            name += f" {size} px"
        loss = partial(cross_entropy, smoothing=self.label_smoothing)
        return [Phase(name, self.reads, loss, image_size=size)]

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        """The recipe's; tensors of one dimension and the head's weight in groups of their own where
        they are not decayed, or have another rate."""  # noqa: D205, D209
        optimizer = run.recipe.build_optimizer(run.parameters)
        if not self.decay_norms or self.bias_rate != 1 or self.head_rate != 1:
            (group,) = optimizer.param_groups
            head_weight = run.own_parameter(run.model.head.weight)
            flat = [p for p in group["params"] if p.dim() < 2]
            head = [p for p in group["params"] if p is head_weight and self.head_rate != 1]
            apart = {id(p) for p in (*flat, *head)}
            group["params"] = [p for p in group["params"] if id(p) not in apart]
            decay = {} if self.decay_norms else {"weight_decay": 0.0}
            optimizer.add_param_group({"params": flat, "lr_scale": self.bias_rate, **decay})
            if head:
                optimizer.add_param_group({"params": head, "lr_scale": self.head_rate})
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
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="Retrain",
        reads="retain",
        formula="CE(R), from new weights",
        cost="1",
        source="the reference of all others",
    )
    kind: ClassVar[Kind] = "reference"
    reads: ClassVar[Reads] = "retain"

    def stream_seed(self, seed: int) -> int:
        """The seed itself where it is shared, else a number of 31 bits keyed by it."""
        return seed if self.share_seed else fresh_seed(seed)
