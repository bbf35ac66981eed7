"""Number format and memory layout of a run: one dataclass, one place that decides."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import nn

from letheon.engine.distributed import Ranks, gather_objects
from letheon.engine.small_convolutions import speed_small_images
from letheon.errors import InputError

LEAST_GAIN = 1.4
"""A product in bf16 must be so many times as fast as in fp32 before a CPU trains in bf16. Seen:
2.25 (Zen 4) and 0.49 (a Xeon without AMX), so that noise does not decide."""
LEAST_PIXELS = 64
"""Smaller images gain little from bf16 on a CPU, or lose."""


@dataclass(frozen=True)
class Precision:
    """How the step computes. Weights, optimiser state and statistics stay float32 always."""

    dtype: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 where a CUDA device has it; on a CPU, training images of 64 pixels or more takes
    the faster of fp32 and bf16 by a measurement at the start, told in one line, and all else is
    fp32. Name it where runs on other machines are to be equal to the bit."""
    channels_last: bool = True
    """Store activations and weights channels-last (NHWC)."""
    compile: Literal["off", "default", "max"] = "off"
    """Compile each phase's loss as one graph; max also searches kernels and uses CUDA graphs."""
    reduce: Literal["auto", "ddp", "flat"] = "auto"
    """How gradients are averaged over ranks. ddp: in buckets during the backward pass; flat: one
    all-reduce of one buffer after it, which also makes SalUn's step one pass over flat buffers;
    auto: flat with several ranks and compile, where buckets would cut the graph; else, in a run of
    200 steps or more, whichever is quicker in a trial before the first step; else ddp."""
    wire: Literal["fp32", "bf16"] = "fp32"
    """Number format of the gradients between ranks; bf16 halves what is sent, and rounds."""

    tune_step: bool = False
    """Choose what `auto` leaves open by trials before the first step, not by capability alone."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.reduce == "ddp" and self.compile != "off":
            raise InputError(
                f"got reduce ddp with compile {self.compile}; buckets cut the graph; "
                "use reduce flat or auto",
                option="reduce",
            )

    def resolve(self, device: torch.device) -> Precision:
        """The same with `auto` decided for this device; refuses what the device cannot do.

        On a CPU `auto` stays and computes in fp32, as evaluation does; `tune` is for training.
        """
        dtype = self.dtype
        if dtype == "auto" and device.type == "cuda":
            dtype = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        if dtype in ("fp16", "tf32") and device.type != "cuda":
            raise InputError(
                f"got dtype {dtype} on {device.type}; use fp32 or bf16 there", option="dtype"
            )
        return replace(self, dtype=dtype)

    def tune(self, size: int, ranks: Ranks) -> tuple[Precision, str]:
        """`auto` decided for training on images of `size` pixels, and a line about it or "".

        On a CPU by what the first rank measures, once a process; every rank must call.
        """
        known = self.resolve(ranks.device)
        if known.dtype != "auto":
            return known, ""
        if size < LEAST_PIXELS:
            return replace(self, dtype="fp32"), ""
        gain = gather_objects(bf16_gain() if ranks.main else 0.0, ranks)[0]
        dtype: Literal["fp32", "bf16"] = "bf16" if gain >= LEAST_GAIN else "fp32"
        line = f"dtype {dtype}: a product in bf16 is {gain:.2f} times as fast as in fp32 here"
        return replace(self, dtype=dtype), f"{line}; bf16 is taken from {LEAST_GAIN} on"

    def reduction(self, world: int) -> Literal["none", "ddp", "flat"]:
        """How this many ranks join their gradients; one rank may still ask for flat buffers."""
        if self.reduce == "flat" or (world > 1 and self.compile != "off"):
            return "flat"
        return "ddp" if world > 1 else "none"

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Move the model to the device and layout; set the process-wide tf32 switches.

        On a CPU, large convolutions of small images become products (`small_images.py`).
        """
        model.to(device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if device.type == "cpu":
            speed_small_images(model)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.dtype != "fp32"
            torch.backends.cudnn.allow_tf32 = self.dtype != "fp32"
            torch.backends.cudnn.benchmark = True

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context for forward passes; a no-op for fp32, tf32 and an undecided `auto`."""
        if self.dtype in ("bf16", "fp16"):
            kind = torch.bfloat16 if self.dtype == "bf16" else torch.float16
            return torch.autocast(device.type, kind)
        return nullcontext()

    @property
    def scales_loss(self) -> bool:
        """True where gradients need loss scaling to survive the number format."""
        return self.dtype == "fp16"


@cache
def bf16_gain(side: int = 512, repeats: int = 5) -> float:
    """How many times as fast as in fp32 this CPU multiplies two matrices in bf16.

    One thread and its own processor time, so that neighbours matter little; takes some 30 ms, and
    draws no random numbers.
    """
    pairs = [torch.ones(side, side, dtype=kind) for kind in (torch.float32, torch.bfloat16)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = [min(_seconds(one) for _ in range(repeats + 1)) for one in pairs]
    finally:
        torch.set_num_threads(threads)
    return best[0] / best[1]


def _seconds(one: torch.Tensor) -> float:
    begun = time.thread_time()
    one @ one
    return time.thread_time() - begun
