"""Crop, mirror, resize and normalize in plain PyTorch: what the Triton kernel must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Filter = Literal["box", "bilinear"]
_CHUNK = 1 << 24  # source values in float32 at once: 64 MiB


def crop_resize_normalize_reference(
    images: Tensor,
    boxes: Tensor,
    source: Tensor,
    flip: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    filter: Filter = "box",
) -> Tensor:
    """`crop_resize_normalize` in plain PyTorch: two matrix products per channel of an image."""
    b, (height, width) = len(boxes), images.shape[1:3]
    boxes = boxes.float()
    rows = _weights(boxes[:, 0], boxes[:, 2], size, height, filter)  # (B, size, H)
    columns = _weights(boxes[:, 1], boxes[:, 3], size, width, filter)  # (B, size, W)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    out = torch.empty(b, size, size, 3, dtype=torch.float32, device=images.device)
    step = max(1, _CHUNK // max(height * width * 3, 1))
    for start in range(0, b, step):
        part = slice(start, start + step)
        pixels = images[source[part]].permute(0, 3, 1, 2).float()  # (b, 3, H, W)
        crops = rows[part, None] @ pixels @ columns[part, None].transpose(2, 3)
        for c in range(3):
            out[part, ..., c] = crops[:, c] * (1 / (255 * std[c])) - mean[c] / std[c]
    return out.permute(0, 3, 1, 2)


def _weights(start: Tensor, extent: Tensor, size: int, length: int, filter: Filter) -> Tensor:
    """(B, size, length) float32: the share of each source pixel in each output pixel."""
    scale = (extent / size)[:, None, None]  # source pixels per output pixel
    cell = torch.arange(size, device=start.device)[None, :, None]
    pixel = torch.arange(length, device=start.device)[None, None, :]
    first = start[:, None, None]
    if filter == "box":
        left, right = first + cell * scale, first + (cell + 1) * scale
        shares = (torch.minimum(right, pixel + 1) - torch.maximum(left, pixel)).clamp_min(0)
    elif filter == "bilinear":
        center = first + (cell + 0.5) * scale
        shares = (1 - (pixel + 0.5 - center).abs() / scale.clamp_min(1)).clamp_min(0)
        inside = (pixel + 0.5 >= first) & (pixel + 0.5 < first + extent[:, None, None])
        shares = shares * inside
    else:
        raise ValueError(f"got filter {filter!r}, expected 'box' or 'bilinear'")
    return shares / shares.sum(2, keepdim=True)
