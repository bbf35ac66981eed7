"""Stored images to rows of a batch: decoded, cut, resized, mirrored and normalised."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import InputError
from letheon.loaders.decode import jpeg
from letheon.loaders.decode.encoded_image import Stored
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment, geometry

Image = NDArray[np.uint8]  # (H, W, 3)


def fill(
    out: Tensor,
    stored: Sequence[Stored | InputError],
    u: NDArray[np.float64] | None,
    preset: Preset,
    scaled: bool = False,
    codec: jpeg.Codec | None = None,
) -> None:
    """Write each image into its row of `out`.

    Args:
        out: (B, S, S, 3), float32 for normalised pixels or uint8 for plain ones.
        stored: B images, or the reasons why they are not there.
        u: (B, D) from `augment.draws`; None is the test transform.
        preset: the geometry and scale.
        scaled: decode large crops at a smaller scale, see `jpeg.cropped`.
        codec: the JPEG library; None takes the fastest.

    Raises:
        InputError: Naming the first image that cannot be read.
    """
    boxes: list[jpeg.Box] = []
    if u is not None and preset.augment == "resized-crop-flip":
        sides = [(1, 1) if isinstance(s, InputError) else (s.height, s.width) for s in stored]
        boxes = augment.boxes(u, np.array(sides, np.int64).reshape(-1, 2)).tolist()
    mirror = np.zeros(len(stored), np.bool_) if u is None else augment.mirrored(u, preset)
    for k, image in enumerate(stored):
        if isinstance(image, InputError):
            raise image
        if boxes:
            part = image.cropped(boxes[k], preset.size if scaled else 0, codec)
            square = geometry.resized(part, preset.size, preset.size, preset)
            row = torch.from_numpy(np.ascontiguousarray(square))
            write(out[k], row.flip(1) if mirror[k] else row, preset)
        elif u is None:
            square = geometry.fitted(image.pixels(codec), preset)
            write(out[k], torch.from_numpy(np.ascontiguousarray(square)), preset)
        else:
            square = geometry.augmented([image.pixels(codec)], u[k : k + 1], preset)[0]
            write(out[k], torch.from_numpy(square), preset)


def write(out: Tensor, pixels: Tensor, preset: Preset) -> None:
    """Copy (S, S, 3) bytes to `out`; into float32 as (x / 255 - mean) / std.

    Goes through rows of 3 S values: a channel's three would be too short an inner loop.
    """
    if out.dtype == torch.uint8:
        out.copy_(pixels)
        return
    size = len(pixels)
    mean, std = _moments(preset, size)
    flat = out.view(size, 3 * size)
    flat.copy_(pixels.reshape(size, 3 * size))
    flat.sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)
def _moments(preset: Preset, size: int) -> tuple[Tensor, Tensor]:
    """(3 S,) mean and standard deviation on the 0..255 scale, repeated for every column."""
    mean, std = ((255 * torch.tensor(part)).repeat(size) for part in (preset.mean, preset.std))
    return mean, std
