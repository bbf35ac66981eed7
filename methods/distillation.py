"""What methods of distillation share: divergence to a teacher, masked targets, paired halves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.method import Run
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.loaders.batch import Batch


@dataclass
class TeacherState(State):
    """The original model, frozen."""

    teacher: Classifier = rebuilt()


def in_fp32(values: Tensor) -> Tensor:
    """Answers of a network in fp32 where autocast has made them bf16 or fp16; others as they are.

    On a CPU autocast leaves softmax, norms and sums in bf16, which has three digits.
    """
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def divergence(logits: Tensor, goal: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) Kullback-Leibler divergence KL(softmax(goal/T) || softmax(logits/T)) * T^2 of each row.

    T^2 keeps the gradient's size (Hinton et al. 2015). A goal may hold minus infinity.
    """
    target = (in_fp32(goal) / temperature).softmax(dim=1)
    log_probabilities = (in_fp32(logits) / temperature).log_softmax(dim=1)
    rows = F.kl_div(log_probabilities, target, reduction="none").sum(dim=1)
    return rows * temperature**2


def class_mask(run: Run) -> Tensor:
    """(classes,) bool on the device, true for the forgotten classes."""
    mask = torch.zeros(run.model.classes, dtype=torch.bool, device=run.ranks.device)
    mask[list(run.forget_classes)] = True
    return mask


def mask_own(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits with minus infinity for each row's own label."""
    return logits.masked_fill(one_hot(labels, logits.shape[1]), -torch.inf)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, classes) bool; torch's own form looks at the labels' values and so waits for them."""
    return labels[:, None] == torch.arange(classes, device=labels.device)


def sum_of_halves(batch: Batch, forget: Tensor, retain: Tensor) -> Tensor:
    """Mean of `forget` (B,) over the forget half of a ``paired`` batch plus that of `retain` (B,)
    over its retain half. Written per sample, so that any split of the batch adds up to it.
    """  # noqa: D205
    return 2 * torch.where(batch.forget, forget, retain).mean()


def require_range(**ranges: tuple[float, float, float]) -> None:
    """Refuse a hyperparameter outside its range; each is (value, lowest, highest), ends included.

    Raises:
        InputError: naming the first that is not finite or out of its range.
    """
    for name, (value, lowest, highest) in ranges.items():
        if math.isfinite(value) and lowest <= value <= highest:
            continue
        up = "or more" if highest == math.inf else f"to {highest:g}"
        raise InputError(f"got {name} {value:g}; expected {lowest:g} {up}", option=name)
