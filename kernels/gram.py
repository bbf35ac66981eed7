"""Inner products between the samples of a batch, of features in any shape and memory order."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(features: Tensor) -> Tensor:
    """(b, ...) to (b, d) without a copy for contiguous and for channels-last features.

    Channels-last maps come out in (height, width, channel) order. A Gram matrix does not change
    when the columns are permuted, so either order serves it; do not use the rows for anything that
    reads a single column.
    """
    if features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last):
        features = features.permute(0, 2, 3, 1)
    return features.flatten(1) if features.dim() > 1 else features[:, None]


def gram(features: Tensor) -> Tensor:
    """(b, b) inner products of the samples: float64 for float64 features, else float32.

    Halves are widened before the product and autocast is off inside. On CUDA the product follows
    `torch.backends.cuda.matmul.fp32_precision`: with tf32 its relative error is about 1e-3, unless
    the features were bf16 or fp16, which tf32 holds exactly.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = as_rows(features)
        if rows.dtype != torch.float64:
            rows = rows.float()
        return rows @ rows.T
