"""Crop, mirror, resize and normalize a batch of uint8 images that already lie on the device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from letheon.kernels import takes_triton
from letheon.kernels.augment_reference import Filter, crop_resize_normalize_reference

__all__ = ["Filter", "crop_resize_normalize"]


def crop_resize_normalize(
    images: Tensor,
    boxes: Tensor,
    source: Tensor,
    flip: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    filter: Filter = "box",
) -> Tensor:
    """One image per box: (pixel / 255 - mean) / std of the resized crop. No host sync.

    `box` is the exact area average: an output pixel is the mean of the source over its rectangle,
    source pixels being constant squares; edges may be fractional. `bilinear` is the antialiased
    triangle filter of Pillow and of `interpolate(antialias=True)`, before their rounding to
    integers; only pixels whose center is in the box count.

    Args:
        images: (N, H, W, 3) uint8.
        boxes: (B, 4) float: top, left, height, width in source pixels, inside the image (not
            checked) and at least one pixel high and wide.
        source: (B,) int64, which image each box is of.
        flip: (B,) bool, mirror left to right.
        size: output height and width.
        mean: of the three channels on the 0..1 scale.
        std: likewise.
        filter: see above.

    Returns:
        (B, 3, size, size) float32, channels-last in memory.
    """
    if takes_triton(images):
        from letheon.kernels.augment_triton import crop_resize_normalize_triton as form
    else:
        form = crop_resize_normalize_reference
    return form(images, boxes, source, flip, size, mean, std, filter)
