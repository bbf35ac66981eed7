"""Number format and memory layout of a run: one dataclass, one place that decides."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from letheon.loaders.errors import InputError


@dataclass(frozen=True)
class Precision:
    """How the step computes. Weights, optimiser state and statistics stay float32 always."""

    dtype: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 where a CUDA device has it, else fp32."""
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

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.reduce == "ddp" and self.compile != "off":
            raise InputError(
                f"got --reduce ddp with --compile {self.compile}; buckets cut the graph; "
                "use --reduce flat or auto"
            )

    def resolved(self, device: torch.device) -> Precision:
        """The same with `auto` decided for this device; refuses what the device cannot do."""
        dtype = self.dtype
        if dtype == "auto":
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            dtype = "bf16" if bf16 else "fp32"
        if dtype in ("fp16", "tf32") and device.type != "cuda":
            raise InputError(f"got --dtype {dtype} on {device.type}; use fp32 or bf16 there")
        return replace(self, dtype=dtype)

    def reduction(self, world: int) -> Literal["none", "ddp", "flat"]:
        """How this many ranks join their gradients; one rank may still ask for flat buffers."""
        if self.reduce == "flat" or (world > 1 and self.compile != "off"):
            return "flat"
        return "ddp" if world > 1 else "none"

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Move the model to the device and layout; set the process-wide tf32 switches."""
        model.to(device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.dtype != "fp32"
            torch.backends.cudnn.allow_tf32 = self.dtype != "fp32"
            torch.backends.cudnn.benchmark = True

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context for forward passes; a no-op for fp32 and tf32."""
        if self.dtype in ("bf16", "fp16"):
            kind = torch.bfloat16 if self.dtype == "bf16" else torch.float16
            return torch.autocast(device.type, kind)
        return nullcontext()

    @property
    def scales_loss(self) -> bool:
        """True where gradients need loss scaling to survive the number format."""
        return self.dtype == "fp16"
