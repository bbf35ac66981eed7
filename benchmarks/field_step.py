"""The training step as the field's published code takes it, written anew from its description.

The baseline of bench_step.py: several small operations per parameter, a whole forward pass of the
teacher under no_grad, and the loss read back after every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from field_kernels import field_masked_step, field_similarity
from torch import Tensor, nn

from letheon.loaders.batch import Batch

Kind = Literal["plain", "salun", "spkd"]


def field_step(
    model: nn.Module,
    batch: Batch,
    kind: Kind,
    masks: list[Tensor],
    channels_last: bool,
    bf16: bool,
    lr: float,
) -> Callable[[], float]:
    """One step of the plain loop, on its own copy of the model; returns the loss as a number."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = copy.deepcopy(model).to(memory_format=layout).train()
    teacher = copy.deepcopy(model).eval()
    images = batch.images.contiguous(memory_format=layout)
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    whole = [m.to(torch.int64).clone(memory_format=torch.preserve_format) for m in masks]
    optimiser = torch.optim.SGD(parameters, lr, 0.9, weight_decay=5e-4)

    def cast() -> AbstractContextManager[object]:
        return torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext()

    def step() -> float:
        with cast():
            output = model(images)
            loss = F.cross_entropy(output.logits, batch.labels)
            if kind == "spkd":
                with torch.no_grad():
                    goal = teacher(images).features
                loss = 10 * loss + 10 * field_similarity(output.features, goal)
        optimiser.zero_grad()
        loss.backward()
        if kind == "salun":
            field_masked_step(parameters, whole, start, optimiser)
        else:
            optimiser.step()
        return loss.item()

    return step
