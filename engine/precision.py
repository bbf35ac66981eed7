"""Precision: number format, memory layout, compiling and gradient reduction of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from torch import nn

from letheon.engine.distributed import Ranks, gather_objects
from letheon.engine.models.small_convolutions import speed_small_images
from letheon.errors import InputError

LEAST_GAIN = 1.4
"""A product in bf16 must be so many times as fast as in fp32 before a CPU trains in bf16. Seen:
2.25 (Zen 4) and 0.49 (a Xeon without AMX), so that noise does not decide."""
LEAST_PIXELS = 64
"""Smaller images gain little from bf16 on a CPU, or lose."""

_SIDE, _REPEATS = 512, 6  # of the matrices that are multiplied; the best of so many counts
_CLEAR = 8  # times as long as in fp32: two products in bf16 say enough


@dataclass(frozen=True)
class Precision:
    """How the step computes. Weights, optimizer state and statistics stay float32 always."""

    dtype: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a CUDA device that has it, else fp32. A format that is slower than fp32 on the
    device is taken where it is named, and said."""
    channels_last: bool = True
    """Store activations and weights channels-last (NHWC)."""
    compile: Literal["off", "blocks", "default", "max"] = "off"
    """Compile each phase's loss as one graph; blocks: the network's repeated blocks alone, each
    kind once, which takes less time before the first step; max: search kernels too, and use CUDA
    graphs."""
    compile_file: Path | None = None
    """File of compiled code, for a warm start on another machine: read where it is there, written
    where anything new was compiled. What it holds is run: name none but your own."""
    reduce: Literal["auto", "ddp", "flat", "shard"] = "auto"
    """How gradients are averaged over ranks. ddp: in buckets during the backward pass; flat: one
    all-reduce of one buffer after it, which also makes SalUn's step one pass over flat buffers;
    shard: weights, gradients and optimizer are split over the ranks, block by block (FSDP2), for a
    network that does not fit on one device; auto: ddp with several ranks, but flat with compile,
    where buckets would cut the graph."""
    wire: Literal["fp32", "bf16"] = "fp32"
    """Number format of the gradients between ranks; bf16 halves what is sent, and rounds."""
    tune_step: bool = False
    """Choose number format and gradient reduction by trials before the first step; not
    deterministic; recorded."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.reduce == "ddp" and self.compile != "off":
            raise InputError(
                f"got reduce ddp with compile {self.compile}; buckets cut the graph; "
                "use reduce flat or auto",
                option="reduce",
            )
        if self.reduce == "shard":
            self._check_shard()

    def _check_shard(self) -> None:
        odd = next(
            (
                text
                for wrong, text in (
                    (self.compile != "off", f"compile {self.compile}"),
                    (self.dtype == "fp16", "dtype fp16"),
                    (self.wire != "fp32", f"wire {self.wire}"),
                    (self.tune_step, "trials of the step"),
                )
                if wrong
            ),
            "",
        )
        if odd:
            raise InputError(
                f"got reduce shard with {odd}; a network split over the ranks is computed "
                "uncompiled, in fp32, tf32 or bf16, with gradients in fp32; leave one of them out",
                option="reduce",
            )

    def resolve(self, device: torch.device) -> Precision:
        """Decide `auto` by what the device can do.

        With `tune_step` a CPU's `auto` stays open for `tune`, and computes in fp32 until then.

        Raises:
            InputError: a format that the device does not have.
        """
        dtype = self.dtype
        if dtype == "auto" and device.type == "cuda":
            # A device before Ampere computes bf16 too, by other instructions and far more slowly.
            has = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bf16" if has else "fp32"
        elif dtype == "auto" and not self.tune_step:
            dtype = "fp32"
        if dtype in ("fp16", "tf32") and device.type != "cuda":
            raise InputError(
                f"got dtype {dtype} on {device.type}; use fp32 or bf16 there", option="dtype"
            )
        return replace(self, dtype=dtype)

    def tune(self, size: int, ranks: Ranks) -> tuple[Precision, str]:
        """Decide `auto` by a trial, for training on images of `size` pixels.

        Equal on every rank: on a CPU the first rank measures, once a process; all must call.

        Returns:
            The precision, and a line about the measurement, "" where nothing was measured.
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

    def reduction(self, world: int) -> Literal["none", "ddp", "flat", "shard"]:
        """Choose how `world` ranks average their gradients; one rank may ask for flat buffers."""
        if self.reduce == "shard":
            return "shard" if world > 1 else "none"
        if self.reduce == "flat" or (world > 1 and self.compile != "off"):
            return "flat"
        return "ddp" if world > 1 else "none"

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Move the model to the device and layout, and choose its kernels."""
        model.to(device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self.choose_kernels(model, device)

    def choose_kernels(self, model: nn.Module, device: torch.device) -> None:
        """Choose the model's kernels on a CPU, the process-wide tf32 switches on CUDA.

        On a CPU, large convolutions of small images become products (`small_convolutions.py`).
        """
        if device.type == "cpu":
            speed_small_images(model)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.dtype != "fp32"
            torch.backends.cudnn.allow_tf32 = self.dtype != "fp32"
            torch.backends.cudnn.benchmark = True

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Make the autocast context of a forward pass; a no-op for fp32, tf32, an open `auto`."""
        if self.dtype in ("bf16", "fp16"):
            kind = torch.bfloat16 if self.dtype == "bf16" else torch.float16
            # Rounded weights of blocks that were let go must not stay in a cache.
            return torch.autocast(device.type, kind, cache_enabled=self.reduce != "shard")
        return nullcontext()

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need loss scaling to survive the number format."""
        return self.dtype == "fp16"


def say_slower(precision: Precision, device: torch.device) -> str:
    """Say that the named format is slower than fp32 on this device; "" where it is not.

    A CPU is measured, once a process; what is computed does not depend on it.
    """
    if precision.dtype != "bf16":
        return ""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ""
        return "dtype bf16: this GPU has no instructions for it; use dtype fp16 or fp32"
    gain = bf16_gain()
    if gain >= 1:
        return ""
    text = f"a product in bf16 is {gain:.2g} times as fast as in fp32 on this CPU"
    return f"dtype bf16: {text}; use dtype fp32"


@cache
def bf16_gain() -> float:
    """Measure how many times as fast as in fp32 this CPU multiplies two matrices in bf16.

    One thread and its own processor time, so that neighbours matter little; takes some 30 ms, 0.2 s
    where there are no instructions for bf16, and draws no random numbers.
    """
    pairs = [torch.ones(_SIDE, _SIDE, dtype=kind) for kind in (torch.float32, torch.bfloat16)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = [min(_seconds(one) for _ in range(_REPEATS)) for one in pairs[:1]]
        best.append(min(_seconds(pairs[1]) for _ in range(2)))  # the first also starts oneDNN
        if best[1] < _CLEAR * best[0]:  # else no repeat makes it the faster one
            best[1] = min(best[1], *(_seconds(pairs[1]) for _ in range(_REPEATS - 2)))
    finally:
        torch.set_num_threads(threads)
    return best[0] / best[1]


def _seconds(one: torch.Tensor) -> float:
    start = time.thread_time()
    one @ one
    return time.thread_time() - start


class _Float32:
    """Float32 as the default dtype, which all threads share, until the last of them leaves."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._before = torch.get_default_dtype()
            self._users += 1
            torch.set_default_dtype(torch.float32)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                torch.set_default_dtype(self._before)


_float32 = _Float32()


@contextmanager
def fresh_modes() -> Iterator[None]:
    """Compute as a new process does, whatever the caller's code has switched on around it.

    Gradients are recorded (`torch.no_grad`, `inference_mode`), nothing is autocast, and new tensors
    are float32 on the CPU; on leaving, all is as it was. The default dtype
    is the process's: of calls that overlap in threads, the last one to end puts it back.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_float32)
        yield
