"""Memory of host and device: how much is free, and buffers that are used again."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device; on the host, no more than its control group may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        amounts = dict(line.split(":", 1) for line in file)
    return min([int(amounts["MemAvailable"].split()[0]) * 1024, *group_rooms()])


GROUPS = Path("/proc/self/cgroup")
"""The control groups of this process."""
MOUNT = Path("/sys/fs/cgroup")
"""Where they are mounted, both versions."""


def group_rooms() -> list[int]:
    """List what may still be taken under each memory limit that holds for this process, in bytes.

    SLURM and containers limit memory by control groups, of which /proc/meminfo knows nothing. Pages
    of files count as free, as they are given up first.
    """
    try:
        lines = GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rooms: list[int] = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, names = (MOUNT / "memory", _FIRST) if kinds else (MOUNT, _SECOND)
        place = top / path.lstrip("/")
        # Within a container the path may be that of the host: the mount's own top then has it.
        for folder in dict.fromkeys([place, *place.parents, top]):
            if folder.is_relative_to(top):
                rooms += _group_room(folder, *names)
    return rooms


_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = ("memory.max", "memory.current", "inactive_file")
_UNLIMITED = 2**60  # version 1 writes a number of this size where there is no limit


def _group_room(folder: Path, limit: str, usage: str, pages: str) -> list[int]:
    """One number where the group has a limit, else none."""
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        if not most.isdecimal() or int(most) >= _UNLIMITED:
            return []
        used = int((folder / usage).read_text(encoding="ascii"))
        kinds = dict(line.split() for line in (folder / "memory.stat").open(encoding="ascii"))
        return [max(0, int(most) - used + int(kinds.get(pages, 0)))]
    except (OSError, ValueError):
        return []


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
