"""Bytes to a model's scale: (x / 255 - mean) / std, on the host or a device."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.loaders.backends.memory import to_device
from letheon.loaders.preset import Preset


@functools.lru_cache(maxsize=32)
def moments(preset: Preset, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(3 * columns,) mean and standard deviation on the 0..255 scale, repeated for every column.

    Kept, since making them would wait for the device.
    """
    mean, std = ((255 * torch.tensor(m)).repeat(columns) for m in (preset.mean, preset.std))
    return mean.to(device), std.to(device)


def normalize(pixels: NDArray[np.uint8], preset: Preset) -> Tensor:
    """(B, 3, S, S) float32 channels-last on the host, from (B, S, S, 3) uint8."""
    x = torch.from_numpy(np.ascontiguousarray(pixels))
    out = torch.empty(x.shape, dtype=torch.float32)
    normalize_into(out, x, preset)
    return out.permute(0, 3, 1, 2)


def normalize_into(out: Tensor, pixels: Tensor, preset: Preset) -> None:
    """Copy (..., S, 3) bytes to `out` of that shape: plain where it is uint8, else normalized.

    Goes through rows of 3 S values: a channel's three would be too short an inner loop.
    """
    if out.dtype == torch.uint8:
        out.copy_(pixels)
        return
    columns = pixels.shape[-2]
    mean, std = moments(preset, columns, pixels.device)
    flat = out.view(-1, 3 * columns)
    flat.copy_(pixels.reshape(-1, 3 * columns))
    flat.sub_(mean).div_(std)


def normalize_on(pixels: Tensor, preset: Preset, device: torch.device) -> Tensor:
    """(B, 3, S, S) float32 channels-last on `device`, from (B, S, S, 3) uint8; no wait."""
    x = to_device(pixels, device).permute(0, 3, 1, 2)
    mean, std = (m[:, None, None] for m in moments(preset, 1, device))
    return x.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)
