"""Test geometry as one box of each image, for the backends that crop and resize in one go."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.loaders.preset import Preset


def check(preset: Preset, loader: str) -> None:
    """Raises `InputError` for a preset that is not a box of the image in training and testing."""
    if preset.augment != "resized-crop-flip" or preset.resize not in ("short", "crop-square"):
        raise InputError(
            f"got a model with augmentation {preset.augment!r} and resize {preset.resize!r} for "
            f"the loader {loader}, expected a resized crop and 'short' or 'crop-square'; use "
            "the loader beton or torch",
            option="loader",
        )


def central(shapes: NDArray[np.int64], preset: Preset) -> NDArray[np.float64]:
    """(B, 4) top, left, height, width of the central crop, in pixels of the (B, 2) originals.

    The plain loader resizes and then cuts; this is the cut in the original, with fractional
    borders, to be resized after. Pixels differ by rounding, and at the very border.
    """
    if preset.resize == "crop-square":
        side = preset.size * shapes.min(axis=1, keepdims=True) // preset.resize_to
        side = np.maximum(side, 1)  # (B, 1)
        corner = (shapes - side + 1) // 2
        return np.concatenate([corner, side, side], axis=1).astype(np.float64)
    resized = preset.resize_to * shapes // shapes.min(axis=1, keepdims=True)  # (B, 2)
    corner = np.rint((resized - preset.size) / 2) * shapes / resized
    return np.concatenate([corner, preset.size * shapes / resized], axis=1)
