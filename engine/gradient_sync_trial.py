"""Time both ways of averaging gradients over ranks before the run, for `tune_step`."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn import functional as F

from letheon.engine.gradient_sync import Alone, Buckets, Flat
from letheon.engine.method import Run

LEAST_STEPS = 200
"""A shorter run does not earn the trial back; it takes buckets."""

_UNTIMED, _TIMED = 2, 3  # DDP orders its buckets anew after the first backward pass


def worth_trying(steps: int) -> bool:
    """Whether a run of so many steps earns the trial's time back."""
    return steps >= LEAST_STEPS


def choose_reduction(run: Run) -> tuple[Literal["ddp", "flat"], str]:
    """Choose the way whose forward and backward pass is quicker on the slowest rank.

    On a copy of the model and random images of the run's size, so the run itself is not touched;
    the copy's weights and gradients are freed after it. Every rank must call; all get the same
    answer. The two ways add in another order, so weights may differ in the last bits.

    Returns:
        The way, and a line that names both times.
    """
    seconds = torch.tensor([_seconds(run, "ddp"), _seconds(run, "flat")], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    ddp, flat = seconds.tolist()
    way: Literal["ddp", "flat"] = "flat" if flat < ddp else "ddp"
    times = f"ddp {1e3 * ddp:.1f} ms, flat {1e3 * flat:.1f} ms"
    return way, f"reduce {way}: forward and backward on the slowest rank: {times}"


def _seconds(run: Run, way: Literal["ddp", "flat"]) -> float:
    """Median over a few batches, on this rank."""
    device, ranks, recipe = run.ranks.device, run.ranks, run.recipe
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # dropout must not move the run's own numbers
        torch.manual_seed(0)
        model = copy.deepcopy(run.model).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        kind = Flat if way == "flat" else Buckets
        reducer: Alone = kind(model, parameters, ranks, run.precision.wire)
        rows = max(1, recipe.batch_size // (ranks.world * recipe.grad_accum_steps))
        size = run.model.preset.size
        images = torch.randn(rows, 3, size, size).to(device, memory_format=torch.channels_last)
        labels = torch.zeros(rows, dtype=torch.int64, device=device)
        times = []
        for _ in range(_UNTIMED + _TIMED):
            dist.barrier()
            _wait(device)
            start = time.perf_counter()
            with reducer.backward(True):
                with run.precision.autocast(device):
                    loss = F.cross_entropy(reducer.net(images).logits, labels)
                loss.backward()
            reducer.average()
            reducer.clear()
            _wait(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[_UNTIMED:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
