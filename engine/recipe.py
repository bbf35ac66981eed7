"""How a run is optimised: epochs, batch, rate, optimizer and batch-norm policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from letheon.engine.optimizers import Lars, Muon
from letheon.errors import InputError

ELEMENTWISE = ("sgd", "adamw")
"""Optimizers that move each weight by its own gradient and slots alone."""


@dataclass(frozen=True)
class Recipe:
    """Optimisation of one run. `batch_size` is global: it does not change with the ranks."""

    epochs: int = 10
    """Passes of the method's phases."""
    lr: float = 0.01
    """Peak learning rate."""
    batch_size: int = 256
    """Samples of one global batch, over all ranks."""
    grad_accum_steps: int = 1
    """Micro-batches a batch is computed in, for want of memory: the same step where batch-norm is
    frozen and the loss a mean over samples."""
    rank_batch: int = 0
    """Images that a rank computes at once, at most: `grad_accum_steps` grows by itself where ranks
    are few, and the batch stays. 0: no bound."""
    activation_checkpoint: bool = False
    """Keep the inputs of a network's blocks alone, and compute their activations again in the
    backward pass: less memory, about a third more work, the same bits."""
    optimizer: Literal["sgd", "adamw", "lars", "muon"] = "sgd"
    """lars: SGD with a rate for each layer (You et al. 2017), for batches of thousands; muon:
    orthogonal steps of convolutions with batch-norm behind them (Jordan et al. 2024)."""
    momentum: float = 0.9
    """Momentum of SGD, LARS and Muon; AdamW uses its own defaults."""
    weight_decay: float = 5e-4
    """Share of the weights added to their gradients (L2); AdamW's is decoupled."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Rate after warm-up, by step; cosine and linear end at 0."""
    warmup: float = 0.0
    """Epochs of linear warm-up from 0 to lr."""
    ema: float = 0.0
    """Share of a running average of the weights that stays at each step; the average is what is
    saved. Batch-norm's running statistics are the network's own. 0: none is kept."""
    log_every: int = 0
    """Steps from one line of progress to the next in metrics.jsonl; 0: one line a pass."""
    on_nonfinite: Literal["stop", "rollback", "skip"] = "stop"
    """What a loss or gradient that is not finite does. stop: the run ends soon after it; skip:
    the step is taken back, which costs a copy of the weights a step; rollback: the pass is
    repeated without the step, which costs one a pass. Steps and samples are recorded."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What happens where a network that started from an original does no better on retain images
    than naming one class always, with epochs to come. stop: the run ends after that epoch, looked
    for after each; warn: it is said, after epochs of which the look is at most a hundredth."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """local: each rank's own batch statistics, running ones averaged over ranks each epoch;
    sync: statistics of the global batch (CUDA); frozen: running statistics, unchanged."""
    batch_norm_group: int = 0
    """Local batch-norm over fixed groups of so many images of the global batch, so that results do
    not depend on the number of ranks (ghost batches, Hoffer et al. 2017); it divides the batch. 0:
    each rank's share is one group."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name, lowest in (
            ("epochs", 0),
            ("batch_size", 1),
            ("grad_accum_steps", 1),
            ("rank_batch", 0),
            ("log_every", 0),
            ("batch_norm_group", 0),
        ):
            if getattr(self, name) < lowest:
                raise InputError(f"got {name} {getattr(self, name)}; expected {lowest} or more")
        for name in ("lr", "weight_decay", "warmup"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"got {name} {value}; expected a finite number of 0 or more")
        for name in ("momentum", "ema"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(f"got {name} {value}; expected 0 <= {name} < 1")
        if self.epochs and self.warmup > self.epochs:
            raise InputError(
                f"got warmup {self.warmup} for {self.epochs} epochs; expected at most the epochs"
            )

        _check_group(self)

    def divide_batch(self, world: int) -> Recipe:
        """Return the recipe with the micro-batches that `world` ranks need to keep `rank_batch`.

        Raises:
            InputError: fewer batch-norm groups in a batch than ranks.
        """
        unit = max(1, self.batch_norm_group)
        if self.batch_norm_group and self.batch_size < world * unit:
            raise InputError(
                f"got {self.batch_size // unit} batch-norm groups of {unit} in a batch of "
                f"{self.batch_size} on {world} ranks; expected at least one a rank; start fewer "
                "ranks, or take smaller groups",
                option="batch_norm_group",
            )
        if not self.rank_batch:
            return self
        share = math.ceil(self.batch_size / unit / world)  # samples, or groups
        steps = max(self.grad_accum_steps, math.ceil(share / (self.rank_batch // unit)))
        return replace(self, grad_accum_steps=steps)

    def rate(self, epoch: float) -> float:
        """Learning rate at a moment, counted in epochs (2.5 is half way through the third)."""
        if epoch < self.warmup:
            return self.lr * epoch / self.warmup
        length = self.epochs - self.warmup
        done = min((epoch - self.warmup) / length, 1.0) if length > 0 else 1.0
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "linear":
            return self.lr * (1 - done)
        return self.lr

    def build_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer over `parameters`, all of them decayed as the field's codes do.

        In torch's fused form: one pass over the weights, and no wait for the host.
        """
        if self.optimizer == "lars":
            return Lars(parameters, self.lr, self.momentum, self.weight_decay)
        if self.optimizer == "muon":
            return Muon(parameters, self.lr, self.momentum, self.weight_decay)
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(
                parameters, self.lr, weight_decay=self.weight_decay, fused=fused
            )
        sgd = torch.optim.SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=fused
        )
        if self.momentum:
            sgd.register_step_pre_hook(fill_momenta)
        return sgd


def _check_group(recipe: Recipe) -> None:
    group = recipe.batch_norm_group
    if not group:
        return
    if recipe.batch_norm != "local":
        raise InputError(
            f"got batch-norm groups of {group} with batch-norm {recipe.batch_norm}; expected "
            "batch-norm local, whose batches they divide; leave one of them out",
            option="batch_norm_group",
        )
    if recipe.batch_size % group:
        raise InputError(
            f"got batch-norm groups of {group} in batches of {recipe.batch_size}; expected a "
            f"batch size that they divide; take {group * max(1, recipe.batch_size // group)}",
            option="batch_norm_group",
        )
    if 0 < recipe.rank_batch < group:
        raise InputError(
            f"got batch-norm groups of {group} and at most {recipe.rank_batch} images at once; "
            "expected room for a group, which is computed at once; take smaller groups",
            option="batch_norm_group",
        )


def fill_momenta(sgd: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: give a weight that has its first gradient later than others a momentum of 0.

    The first step of plain SGD does the same; torch's fused form fails on such a weight.
    """
    weights = [weight for group in sgd.param_groups for weight in group["params"]]
    late = [w for w in weights if sgd.state.get(w, {}).get("momentum_buffer") is None]
    if len(late) == len(weights):
        return
    for weight in late:
        if weight.grad is not None:
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
