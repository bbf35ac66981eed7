"""From decoded images to squares of a model's size: the preset's geometry and augmentation."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.loaders.preset import ALTERNATE, CROP, Preset
from letheon.loaders.transforms import augment

Image = NDArray[np.uint8]  # (H, W, 3), or (B, H, W, 3) where many are of one size
Images = Sequence[Image] | Image
THIN = 32  # times as long as wide; no photograph is


def resize(image: Image, height: int, width: int, preset: Preset) -> Image:
    """`image` at height x width by the preset's interpolation, antialiased, rounded to bytes."""
    if image.shape[:2] == (height, width):
        return image
    # here: torchvision takes a second to import, and images of the right size do not need it
    from torchvision.transforms.v2 import InterpolationMode, functional

    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    mode = InterpolationMode(preset.interpolation)
    planes = functional.resize(planes, [height, width], interpolation=mode, antialias=True)
    return planes.permute(1, 2, 0).numpy()


def import_resize() -> None:
    """Import torchvision's resize, before processes are forked that would each import it."""
    importlib.import_module("torchvision.transforms.v2")


def fit(image: Image, preset: Preset) -> Image:
    """(size, size, 3): the preset's test geometry."""
    size, height, width = preset.size, image.shape[0], image.shape[1]
    short = min(height, width)
    if preset.resize == "none":
        return resize(image, size, size, preset)
    if preset.resize == "crop-square":
        side = max(size * short // preset.resize_to, 1)
        top, left = (height - side + 1) // 2, (width - side + 1) // 2
        return resize(image[top : top + side, left : left + side], size, size, preset)
    if preset.resize == "square":
        height = width = preset.resize_to
    else:
        if max(height, width) > THIN * short:
            image = _cut_thin(image, preset)
            height, width = image.shape[:2]
        height, width = preset.resize_to * height // short, preset.resize_to * width // short
    image = resize(image, height, width, preset)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def _cut_thin(image: Image, preset: Preset) -> Image:
    """The middle of a thin image: what the central crop shows after resizing, and a margin.

    Resized whole, an image of 8000 x 1 pixels would take gigabytes.
    """
    short = min(image.shape[:2])
    reach = -(-short * preset.size // (2 * preset.resize_to)) + 4 * short  # to either side
    top, left = (max(side // 2 - reach, 0) for side in image.shape[:2])
    return image[top : image.shape[0] - top, left : image.shape[1] - left]


def squares(images: Images, preset: Preset) -> Image:
    """(B, size, size, 3): all images in test geometry; arrays that fit already are not touched."""
    if isinstance(images, np.ndarray) and _fits(images, preset):
        return images
    out = np.empty((len(images), preset.size, preset.size, 3), dtype=np.uint8)
    for row, image in zip(out, images, strict=True):
        row[:] = fit(image, preset)
    return out


def _fits(images: Image, preset: Preset) -> bool:
    same = images.shape[1:3] == (preset.size, preset.size)
    return same and (preset.resize == "none" or preset.resize_to == preset.size)


def augment_images(images: Images, u: NDArray[np.float64], preset: Preset) -> Image:
    """(B, size, size, 3): the preset's training geometry; `u` from `augment.draws`."""
    size, pad = preset.size, preset.margin
    out = np.empty((len(images), size, size, 3), dtype=np.uint8)
    if preset.augment == "resized-crop-flip":
        shapes = np.array([image.shape[:2] for image in images], dtype=np.int64).reshape(-1, 2)
        boxes = augment.boxes(u, shapes)
    else:
        images, corners = squares(images, preset), np.zeros((len(images), 2), dtype=np.int64)
        if preset.augment in CROP:
            around = ((0, 0), (pad, pad), (pad, pad), (0, 0))
            if preset.augment in ALTERNATE:
                images = np.pad(images, around, "reflect")
            else:
                images = np.pad(images, around)
            corners = augment.offsets(u, preset)
        boxes = np.concatenate([corners, np.full_like(corners, size)], axis=1)
    for row, image, (top, left, height, width), mirrored in zip(
        out, images, boxes.tolist(), augment.mirror_mask(u, preset).tolist(), strict=True
    ):
        piece = resize(image[top : top + height, left : left + width], size, size, preset)
        row[:] = piece[:, ::-1] if mirrored else piece
    return out
