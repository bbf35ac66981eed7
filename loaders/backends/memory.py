"""Memory of host and device: how much is free, and buffers that are used again."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        amounts = dict(line.split(":", 1) for line in file)
    return int(amounts["MemAvailable"].split()[0]) * 1024


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device, by pinned memory: from other memory it would wait.

    Where it lies on the device already, or the device is the CPU, it is the tensor itself.
    """
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


class Buffers:
    """Host tensors of one size, at most `keep` of them idle.

    Fresh memory costs a page fault for every 4 KiB, as much time as normalising an image. A tensor
    is given out again only after its storage was freed, so no batch ever changes under a reader.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._idle: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> Tensor:
        """A tensor with arbitrary contents."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._idle = [block for block in self._idle if len(block) >= size]
        block = self._idle.pop() if self._idle else np.empty(size, np.uint8)
        view = block[:size].view(dtype).reshape(shape)
        # The tensor's storage holds this view and no one else does.
        weakref.finalize(view, _give_back, weakref.ref(self), block)
        return torch.from_numpy(view)

    def _take_back(self, block: NDArray[np.uint8]) -> None:
        if len(self._idle) < self._keep:
            self._idle.append(block)


def _give_back(buffers: weakref.ref[Buffers], block: NDArray[np.uint8]) -> None:
    here = buffers()
    if here is not None:
        here._take_back(block)
