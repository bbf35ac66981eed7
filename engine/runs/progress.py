"""Lines of progress within a pass, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Progress:
    """Every `every` steps, a line with the mean loss of this rank's samples since the last one.

    Without waiting for the device: what the steps added up to is copied to the host when a line is
    due, and read when the next one is, by when the copy is long done.
    """

    def __init__(self, every: int, write: Callable[..., None]):
        """`write(step=..., loss=..., lr=...)` is called once a line."""
        self.every, self.write = every, write
        self.before = (0.0, 0.0)  # loss and samples at the last line
        self._sent: tuple[Tensor, torch.cuda.Event | None, int, float] | None = None

    def step(self, number: int, sums: Tensor, rate: float) -> None:
        """After step `number`, counted from one; `sums` holds loss and samples so far, on top."""
        if number % self.every:
            return
        self.read()
        if sums.is_cuda:
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            host.copy_(sums, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        else:
            host, done = sums.clone(), None
        self._sent = (host, done, number, rate)

    def read(self) -> None:
        """Write the line that is on its way, if any; also at the end of the pass."""
        if self._sent is None:
            return
        host, done, number, rate = self._sent
        self._sent = None
        if done is not None:
            done.synchronize()
        loss, samples = host[:2].tolist()
        mean = (loss - self.before[0]) / (samples - self.before[1])
        self.before = (loss, samples)
        self.write(step=number, loss=mean if math.isfinite(mean) else str(mean), lr=rate)
