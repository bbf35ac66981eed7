"""Training augmentation as a function of (seed, epoch, sample index), for every backend.

Column 0 of the draws is the mirror, 1 and 2 the position, the rest the tries of the resized crop.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.kernels import keyed
from letheon.loaders.order import turn_epoch
from letheon.loaders.preset import ALTERNATE, Preset

TRIES = 10
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def draws(
    seed: int, epoch: int, turn: NDArray[np.int64], index: NDArray[np.int64], preset: Preset
) -> NDArray[np.float64]:
    """(B, D) in [0, 1); a sample that comes again in an epoch (`turn` > 0) is drawn afresh.

    For an alternating flip column 0 is 0 or 0.5, by one draw of the sample for all epochs, turned
    around in every other epoch or turn.
    """
    columns = 3 + 2 * TRIES if preset.augment == "resized-crop-flip" else 3
    epochs = torch.from_numpy(turn_epoch(0, 1) * turn + epoch)  # (B,)
    samples = torch.from_numpy(index)
    u = keyed.uniform(seed, "augment", epochs, samples, columns).numpy()
    if preset.augment in ALTERNATE:
        first = keyed.uniform(seed, "alternate", 0, samples, 1)[:, 0].numpy() < 0.5
        u[:, 0] = np.where(first ^ ((epoch + turn) % 2 == 1), 0.0, 0.5)
    return u


def mirror_mask(u: NDArray[np.float64], preset: Preset) -> NDArray[np.bool_]:
    """(B,) whether a sample is mirrored left to right."""
    flips = preset.augment in ("flip", "pad-crop-flip", "resized-crop-flip", *ALTERNATE)
    return (u[:, 0] < 0.5) & flips


def offsets(u: NDArray[np.float64], preset: Preset) -> NDArray[np.int64]:
    """(B, 2) top and left of the crop in an image padded by the preset's margin on every side."""
    return (u[:, 1:3] * (2 * preset.margin + 1)).astype(np.int64)


def boxes(u: NDArray[np.float64], shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B, 4) top, left, height, width of the resized crop, given (B, 2) heights and widths.

    The crop of Szegedy et al. 2015 as torchvision draws it: the first of ten tries that fits, else
    the largest central crop of an admitted ratio.
    """
    height, width = shapes[:, :1].astype(np.float64), shapes[:, 1:].astype(np.float64)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * u[:, 3 : 3 + TRIES])  # (B, TRIES)
    low, high = np.log(RATIO[0]), np.log(RATIO[1])
    ratio = np.exp(low + (high - low) * u[:, 3 + TRIES :])
    h, w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = fits.argmax(axis=1)[:, None]
    central_h = np.minimum(height, np.rint(width / RATIO[0]))
    central_w = np.minimum(width, np.rint(height * RATIO[1]))
    found = fits.any(axis=1, keepdims=True)
    h = np.where(found, np.take_along_axis(h, first, axis=1), central_h)
    w = np.where(found, np.take_along_axis(w, first, axis=1), central_w)
    top = np.where(found, np.floor(u[:, 1:2] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(u[:, 2:3] * (width - w + 1)), (width - w) // 2)
    return np.concatenate([top, left, h, w], axis=1).astype(np.int64)
