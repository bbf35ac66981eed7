"""The training step as the field's published code takes it, written anew from its description.

The baseline of bench_step.py: several small operations per parameter, a whole forward pass of the
teacher under no_grad, and the loss read back after every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baseline.kernels import masked_step, similarity
from letheon.loaders.batch import Batch

Kind = Literal["plain", "salun", "spkd"]
LR = 1e-4


class Format(NamedTuple):
    """How a rung computes."""

    channels_last: bool = False
    bf16: bool = False


def plain_step(
    model: nn.Module, batch: Batch, kind: Kind, masks: Sequence[Tensor], form: Format
) -> Callable[[], float]:
    """One step of the plain loop, on its own copy of the model; returns the loss as a number."""
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    model = copy.deepcopy(model).to(memory_format=layout).train()
    teacher = copy.deepcopy(model).eval()
    images = batch.images.contiguous(memory_format=layout)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    integers = {
        name: m.to(torch.int64).clone(memory_format=torch.preserve_format)
        for name, m in zip(start, masks, strict=True)
    }
    optimizer = torch.optim.SGD(model.parameters(), LR, 0.9, weight_decay=5e-4)

    def cast() -> AbstractContextManager[object]:
        return torch.autocast(images.device.type, torch.bfloat16) if form.bf16 else nullcontext()

    def step() -> float:
        with cast():
            output = model(images)
            loss = F.cross_entropy(output.logits, batch.labels)
            if kind == "spkd":
                with torch.no_grad():
                    goal = teacher(images).features
                loss = 10 * loss + 10 * similarity(output.features, goal)
        optimizer.zero_grad()
        loss.backward()
        if kind == "salun":
            masked_step(model, integers, start, optimizer)
        else:
            optimizer.step()
        return loss.item()

    return step
