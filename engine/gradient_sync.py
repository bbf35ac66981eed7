"""Average the gradients over the ranks: DDP's buckets, or one flat all-reduce.

Buckets are reduced while the backward pass still runs, but its hooks would cut a compiled graph in
pieces. The flat buffer is reduced in one call after the backward pass: nothing overlaps, and the
graph stays whole. `docs/step.md` says when which is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from letheon.engine.distributed import Ranks
from letheon.kernels.flat import Layout, adopt_

# Running statistics are averaged once an epoch, not sent each step; newer torch renamed the option.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers": False
}


class Alone:
    """One rank: the gradients are what the backward pass leaves."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]):
        self.net = model
        self._parameters = parameters

    def backward(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last` closes the batch."""
        return nullcontext()

    def average(self) -> None:
        """After the last backward pass: the gradients become the mean over the ranks."""

    def part_gradients(self, value: Tensor, keep: bool) -> Sequence[Tensor | None]:
        """Compute the gradient of a scalar, apart from `.grad`: one tensor per parameter, or None.

        Not averaged over the ranks, unless the backward pass does that by itself. `keep` leaves the
        graph for another scalar.
        """
        return torch.autograd.grad(value, self._parameters, retain_graph=keep, allow_unused=True)

    def clear(self) -> None:
        """After the step. Without a gradient the next backward pass writes instead of adding."""
        for parameter in self._parameters:
            parameter.grad = None


class Buckets(Alone):
    """DDP: buckets of gradients are reduced while the backward pass still runs."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        ranks: Ranks,
        wire: Literal["fp32", "bf16"],
        static: bool = False,
    ):
        """`static` promises DDP that every backward pass reaches the same parameters."""
        self._parameters = parameters
        # Backward passes until DDP has its final buckets; the first of a static graph is not seen.
        self.warmup = 2 if static else 1
        self.ddp = DistributedDataParallel(
            model,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=static,
            **_NO_BUFFER_SYNC,
        )
        if wire == "bf16":
            self.ddp.register_comm_hook(None, bf16_compress_hook)
        self.net = self.ddp

    def backward(self, last: bool) -> AbstractContextManager[None]:
        """Only the last micro-batch sends; the others add up on their own rank."""
        return nullcontext() if last else self.ddp.no_sync()


class Flat(Alone):
    """Weights and gradients as one buffer each, of which the parameters and `.grad` are views.

    Build it once the model is on its device and in its layout, before it is compiled. A parameter
    that takes no part in the loss has a zero gradient here, where elsewhere it has none.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        ranks: Ranks,
        wire: Literal["fp32", "bf16"] = "fp32",
    ):
        super().__init__(model, parameters)
        self.layout = Layout.of(parameters)
        self.weights = adopt_(parameters, self.layout)  # (layout.length,) float32
        self.gradients = torch.zeros_like(self.weights)
        for parameter, view in zip(parameters, self.layout.views(self.gradients), strict=True):
            parameter.grad = view
        self._ranks, self._wire = ranks, wire

    def average(self) -> None:
        """One all-reduce, bitwise equal on every rank; bf16 on the wire halves what is sent."""
        if self._ranks.world == 1:
            return
        self.gradients /= self._ranks.world
        if self._wire == "bf16":
            sent: Tensor = self.gradients.to(torch.bfloat16)
            dist.all_reduce(sent)
            self.gradients.copy_(sent)
        else:
            dist.all_reduce(self.gradients)

    def clear(self) -> None:
        """The views stay: the backward pass adds to zeros."""
        self.gradients.zero_()
