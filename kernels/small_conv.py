"""Convolution of small images as a few matrix products, in place of a library's kernel.

oneDNN's float32 kernels read the whole weight for every image; where the output is 2 x 2 pixels and
the weight is megabytes, that is nearly all they do. Here every output position is a product of
(images, pixels it sees x channels) with the part of the weight that meets them: the weight is read
once for a batch, nothing is unfolded or copied, and what would meet padding is never multiplied.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


class Tap(NamedTuple):
    """One output position meets one row of the kernel: columns of that row over image columns."""

    out: int  # output position, row-major
    row: int  # of the image
    first: int  # image columns first:last
    last: int
    kernel_row: int
    kernel_first: int  # kernel columns kernel_first:kernel_last, as many
    kernel_last: int


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Height and width of what a convolution without dilation gives; at most 0 where none fits."""
    high, wide = ((size[k] + 2 * padding[k] - kernel[k]) // stride[k] + 1 for k in range(2))
    return high, wide


@cache
def taps(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Tap, ...]:
    """List every pair of an output position and a kernel row that meet; none of it is padding."""
    high, wide = output_size(size, kernel, stride, padding)
    pieces = []
    for y in range(high):
        for x in range(wide):
            top, left = y * stride[0] - padding[0], x * stride[1] - padding[1]
            first, last = max(0, -left), min(kernel[1], size[1] - left)
            for k in range(max(0, -top), min(kernel[0], size[0] - top)):
                if first < last:
                    pieces.append(
                        Tap(y * wide + x, top + k, left + first, left + last, k, first, last)
                    )
    return tuple(pieces)


def small_conv2d(
    image: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
) -> Tensor:
    """`F.conv2d` without groups and dilation, equal to rounding; differentiable once.

    Quick where the output has few positions and the weight is large, both channels-last; other
    memory orders are copied first. In bf16 the sums over kernel rows are rounded one by one.

    Args:
        image: (B, C, H, W) float32, float64 or bfloat16; B may be 0.
        weight: (D, C, kernel height, kernel width) of the same dtype.
        bias: (D,) or none.
        stride: of rows and of columns.
        padding: the same, zeros on either side.

    Returns:
        (B, D, H', W'), channels-last.

    Raises:
        ValueError: the channels do not match (as with groups), or no position fits.
    """
    size, kernel = (image.shape[2], image.shape[3]), (weight.shape[2], weight.shape[3])
    if weight.shape[1] != image.shape[1]:
        raise ValueError(f"weight for {weight.shape[1]} channels, image of {image.shape[1]}")
    if min(output_size(size, kernel, stride, padding)) < 1:
        raise ValueError(f"kernel {kernel} does not fit an image of {size}, padding {padding}")
    if kernel == stride == (1, 1) and padding == (0, 0):  # pixels are as good as images
        pixels = image.permute(0, 2, 3, 1).flatten(0, 2)[..., None, None]
        answer: Tensor = _Products.apply(pixels, weight, bias, stride, padding)
        return answer.view(image.shape[0], *size, len(weight)).permute(0, 3, 1, 2)
    answer = _Products.apply(image, weight, bias, stride, padding)
    return answer


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        size, kernel = (image.shape[2], image.shape[3]), (weight.shape[2], weight.shape[3])
        ctx.save_for_backward(image, weight)
        ctx.taps = taps(size, kernel, stride, padding)
        high, wide = output_size(size, kernel, stride, padding)
        c = image.shape[1]
        pixel_rows, kernels = _rows(image), _rows(weight)
        out = image.new_zeros(len(image), high * wide, len(weight))
        if bias is not None:
            out += bias
        for tap in ctx.taps:
            pixels = pixel_rows[:, tap.row, tap.first * c : tap.last * c]  # (B, columns * C)
            part = kernels[:, tap.kernel_row, tap.kernel_first * c : tap.kernel_last * c]
            out[:, tap.out].addmm_(pixels, part.T)
        return out.view(len(image), high, wide, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        c = image.shape[1]
        outer = gradient.permute(0, 2, 3, 1).flatten(1, 2)  # (B, positions, D)
        of_image = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            kernels = _rows(weight)
            of_image = image.new_zeros(len(image), image.shape[2], image.shape[3] * c)
            for tap in ctx.taps:
                part = kernels[:, tap.kernel_row, tap.kernel_first * c : tap.kernel_last * c]
                of_image[:, tap.row, tap.first * c : tap.last * c].addmm_(outer[:, tap.out], part)
            of_image = _maps(of_image, c)
        if ctx.needs_input_grad[1]:
            pixel_rows = _rows(image)
            of_weight = weight.new_zeros(len(weight), weight.shape[2], weight.shape[3] * c)
            for tap in ctx.taps:
                part = of_weight[:, tap.kernel_row, tap.kernel_first * c : tap.kernel_last * c]
                pixels = pixel_rows[:, tap.row, tap.first * c : tap.last * c]
                part.addmm_(outer[:, tap.out].T, pixels)
            of_weight = _maps(of_weight, c)
        if ctx.needs_input_grad[2]:
            of_bias = outer.sum((0, 1))
        return of_image, of_weight, of_bias, None, None


def _rows(maps: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W * C): a view where it is channels-last."""
    return maps.permute(0, 2, 3, 1).flatten(2)


def _maps(rows: Tensor, c: int) -> Tensor:
    """(B, H, W * C) to (B, C, H, W), channels-last, without a copy."""
    return rows.unflatten(2, (rows.shape[2] // c, c)).permute(0, 3, 1, 2)
