"""How fast a model learns the forgotten classes again: the relearn curve, time and index.

The time a fixed recipe needs shows what the weights kept (Golatkar et al. 2020; Chundawat et al.
2023, anamnesis index). One loop serves the three forms; what differs is what it reads:

- same data: the model and batches of the forget set (with retain samples or without);
- related data: the model and batches of samples that resemble the forget set but are not of it;
- head only: `head_on_features`, a linear layer on frozen features, and batches of features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from letheon.engine.memory.shards import from_first, is_split
from letheon.errors import InputError, RunFailed
from letheon.kernels.keyed import permutation

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Step number from 0 -> (inputs, labels (B,)) on the model's device."""

Place = Callable[[Any], nn.Module]
"""Network -> a copy of it where it is to learn."""


class RelearnCurve(NamedTuple):
    """Accuracy while relearning; the first entry is before the first step."""

    steps: list[int]
    accuracy: list[float]
    reached: int | None  # the first measured step with at least the target, None where none had it


def feature_batches(features: Tensor, labels: Tensor, batch_size: int, seed: int) -> Batches:
    """Shuffle rows into batches, each row once an epoch, the last batch short; keyed by `seed`."""
    count = len(labels)
    if count == 0 or len(features) != count or batch_size < 1:
        raise InputError(
            f"got {len(features)} rows, {count} labels and batches of {batch_size}; "
            "expected as many labels as rows, and batches of at least one"
        )
    each = -(-count // batch_size)
    orders: dict[int, Tensor] = {}

    def batch(step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, each)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = permutation(seed, "relearn", epoch, count).to(features.device)
        rows = orders[epoch][place * batch_size : (place + 1) * batch_size]
        return features[rows], labels[rows]

    return batch


def head_on_features(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Build a linear layer of weights (C, D) and bias (C,), to relearn on frozen features."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return head


def relearn(
    net: nn.Module,
    batches: Batches,
    measure: Callable[[nn.Module], float],
    *,
    steps: int = 100,
    every: int = 5,
    target: float | None = None,
    lr: float = 0.01,
    place: Place = copy.deepcopy,
) -> RelearnCurve:
    """Fine-tune a copy of `net` by SGD on cross-entropy and measure it on the way; momentum is 0.9.

    The model stays in evaluation mode, so batch-norm statistics and dropout play no part and every
    model is given the same recipe; `net` itself is untouched. Measured before the first step,
    every `every` steps and after the last; stops at the first measurement that has `target`.

    Args:
        net: a module whose output is logits (B, C), or a named tuple with the field `logits`.
        batches: of the data to relearn from.
        measure: held-out accuracy on the forgotten classes, in [0, 1]; called without gradients.
        steps: at most this many.
        every: steps between measurements.
        target: accuracy that counts as relearned, say the original model's less 0.05.
        lr: constant learning rate.
        place: copies `net` to where it learns; without batch-norm's or dropout's training mode.

    Raises:
        InputError: a recipe out of range.
        RunFailed: a loss that is no longer a number.
    """
    if steps < 1 or every < 1 or lr <= 0:
        raise InputError(
            f"got {steps} steps, a measurement every {every} and lr {lr}; expected all above 0"
        )
    learner = place(net).eval().requires_grad_(True)
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, momentum=0.9)
    seen, accuracy = [0], [_accuracy(measure, learner)]
    reached = 0 if target is not None and accuracy[0] >= target else None
    for step in range(1, steps + 1):
        if reached is not None:
            break
        inputs, labels = batches(step - 1)
        answer = learner(inputs)
        loss = nn.functional.cross_entropy(getattr(answer, "logits", answer), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            if not bool(torch.isfinite(loss)):
                raise RunFailed(
                    f"got a loss that is not finite at relearn step {step}; lower lr ({lr})"
                )
            seen.append(step)
            accuracy.append(_accuracy(measure, learner))
            reached = step if target is not None and accuracy[-1] >= target else None
    return RelearnCurve(seen, accuracy, reached)


RATES = (0.01, 0.003, 0.001, 0.0003, 0.0001)
"""Learning rates of relearning, the usual one first."""
TRIAL = 20
"""Steps after which a rate is held to be safe."""


def find_rate(net: nn.Module, batches: Batches, place: Place = copy.deepcopy) -> float:
    """Return the largest of `RATES` at which `net` can relearn without falling apart.

    Of 20 steps none may have a loss above twice the first one's plus one half. Ask it of the
    original, which knows the images: at 0.01 some originals fell from 96 % to 0 while relearning
    what they knew.

    Args:
        net: as in `relearn`; it stays as it is.
        batches: of images that it knows.
        place: as in `relearn`.
    """
    for rate in RATES:
        learner = place(net).eval().requires_grad_(True)
        optimizer = torch.optim.SGD(learner.parameters(), lr=rate, momentum=0.9)
        losses: list[float] = []
        for step in range(TRIAL):
            inputs, labels = batches(step)
            answer = learner(inputs)
            loss = nn.functional.cross_entropy(getattr(answer, "logits", answer), labels)
            losses.append(_of_all(learner, float(loss.detach())))
            if not losses[-1] <= 2 * losses[0] + 0.5:  # also where it is no number
                break
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        else:
            return rate
    return RATES[-1]


def _accuracy(measure: Callable[[nn.Module], float], net: nn.Module) -> float:
    with torch.no_grad():
        return _of_all(net, float(measure(net)))


def _of_all(net: nn.Module, number: float) -> float:
    """The first rank's number where the network is split: all ranks must decide alike."""
    return from_first(number) if is_split(net) else number
