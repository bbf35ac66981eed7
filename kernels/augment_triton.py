# Triton reads the parameters of a kernel itself and has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Crop, mirror, resize and normalize as one Triton kernel from uint8 to channels-last.

Each program makes a run of output pixels of one image and visits the source pixels under them, so
nothing but the source and the result passes through memory: about 0.4 MB an image at 224 px.
Unmeasured on a GPU; kept until benchmarks/gpu_suite.py has run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from letheon.kernels.augment_reference import Filter

BLOCK = 256


@triton.jit
def _first(start, scale, cell, BOX: tl.constexpr):
    """The first source pixel that can matter to an output pixel along one axis."""
    if BOX:
        return tl.floor(start + cell * scale).to(tl.int32)
    return tl.floor(start + (cell + 0.5) * scale - tl.maximum(scale, 1.0) - 0.5).to(tl.int32)


@triton.jit
def _share(start, extent, scale, cell, pixel, length, BOX: tl.constexpr):
    """The weight of a source pixel, zero outside the box and outside the image."""
    if BOX:
        right = tl.minimum(start + (cell + 1) * scale, pixel + 1.0)
        weight = right - tl.maximum(start + cell * scale, pixel.to(tl.float32))
    else:
        center = pixel + 0.5
        away = tl.abs(center - start - (cell + 0.5) * scale)
        weight = 1.0 - away / tl.maximum(scale, 1.0)
        weight = tl.where((center >= start) & (center < start + extent), weight, 0.0)
    return tl.where((pixel >= 0) & (pixel < length), tl.maximum(weight, 0.0), 0.0)


@triton.jit
def resize_kernel(
    images, boxes, source, flip, out, height, width, size,
    scale0, scale1, scale2, offset0, offset1, offset2,
    BOX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (images, runs of BLOCK output pixels)."""
    image = tl.program_id(0)
    top = tl.load(boxes + image * 4)
    left = tl.load(boxes + image * 4 + 1)
    tall = tl.load(boxes + image * 4 + 2)
    wide = tl.load(boxes + image * 4 + 3)
    step_y = tall / size
    step_x = wide / size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size * size
    y = at // size
    x = at % size
    x = tl.where(tl.load(flip + image) != 0, size - 1 - x, x)
    start_y = _first(top, step_y, y, BOX)
    start_x = _first(left, step_x, x, BOX)
    if BOX:
        taps_y = tl.ceil(step_y).to(tl.int32) + 1
        taps_x = tl.ceil(step_x).to(tl.int32) + 1
    else:
        taps_y = tl.ceil(2 * tl.maximum(step_y, 1.0)).to(tl.int32) + 2
        taps_x = tl.ceil(2 * tl.maximum(step_x, 1.0)).to(tl.int32) + 2
    base = images + tl.load(source + image).to(tl.int64) * height * width * 3
    red = tl.zeros((BLOCK,), tl.float32)
    green = tl.zeros((BLOCK,), tl.float32)
    blue = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for tap_y in range(taps_y):
        row = start_y + tap_y
        share_y = _share(top, tall, step_y, y, row, height, BOX)
        for tap_x in range(taps_x):
            column = start_x + tap_x
            weight = share_y * _share(left, wide, step_x, x, column, width, BOX)
            used = inside & (weight > 0)
            pixel = base + (row * width + column) * 3
            red += weight * tl.load(pixel, mask=used, other=0).to(tl.float32)
            green += weight * tl.load(pixel + 1, mask=used, other=0).to(tl.float32)
            blue += weight * tl.load(pixel + 2, mask=used, other=0).to(tl.float32)
            total += weight
    into = out + image.to(tl.int64) * size * size * 3 + at * 3
    kind = out.dtype.element_ty
    tl.store(into, (red / total * scale0 + offset0).to(kind), mask=inside)
    tl.store(into + 1, (green / total * scale1 + offset1).to(kind), mask=inside)
    tl.store(into + 2, (blue / total * scale2 + offset2).to(kind), mask=inside)


def crop_resize_normalize_triton(
    images: Tensor,
    boxes: Tensor,
    source: Tensor,
    flip: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    filter: Filter = "box",
) -> Tensor:
    """`crop_resize_normalize` in one launch.

    Raises:
        ValueError: the images are not contiguous (a copy of the whole set would hide here), or the
            filter is unknown.
    """
    if filter not in ("box", "bilinear"):
        raise ValueError(f"got filter {filter!r}, expected 'box' or 'bilinear'")
    if not images.is_contiguous():
        raise ValueError(
            f"got images with strides {images.stride()}, expected (N, H, W, 3) without holes; "
            "make them contiguous once, when they are stored"
        )
    out = torch.empty(len(boxes), size, size, 3, dtype=torch.float32, device=images.device)
    scale = [1 / (255 * s) for s in std]
    offset = [-m / s for m, s in zip(mean, std, strict=True)]
    if out.numel():
        resize_kernel[(len(boxes), triton.cdiv(size * size, BLOCK))](
            images, boxes.float().contiguous(), source.contiguous(),
            flip.contiguous().view(torch.uint8), out, *images.shape[1:3], size, *scale, *offset,
            BOX=filter == "box", BLOCK=BLOCK,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)
