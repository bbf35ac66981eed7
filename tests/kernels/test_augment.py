"""Crop and resize against torch's own resampling and against exact areas by supersampling."""

import pytest
import torch
import torch.nn.functional as F

from letheon.kernels.augment import crop_resize_normalize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def images(n=3, height=40, width=52, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=gen)


def normalised(pixels):
    """(..., 3, h, w) on the 0..255 scale."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("size", [1, 8, 17, 64])
def test_bilinear_equals_antialiased_interpolation_of_the_crop(size):
    pixels = images()
    boxes = [(3, 5, 20, 31), (0, 0, 40, 52), (10, 10, 7, 9), (39, 51, 1, 1)]
    source, flip = torch.tensor([2, 0, 0, 1]), torch.tensor([False, True, False, True])
    out = crop_resize_normalize(
        pixels, torch.tensor(boxes), source, flip, size, MEAN, STD, filter="bilinear"
    )
    for i, (top, left, height, width) in enumerate(boxes):
        crop = pixels[source[i], top : top + height, left : left + width].permute(2, 0, 1).float()
        expected = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
        expected = expected.flip(2) if flip[i] else expected
        torch.testing.assert_close(out[i], normalised(expected), rtol=1e-4, atol=2e-5)


def test_box_with_fractional_edges_equals_the_exact_area():
    pixels, fine, size = images(1, 12, 16), 20, 5
    # Edges on a grid of 1/20 pixel, cells of 1/4 pixel: supersampling by 20 is then exact.
    top, left, height, width = 1.25, 2.5, 6.25, 11.25
    out = crop_resize_normalize(
        pixels, torch.tensor([[top, left, height, width]]), torch.tensor([0]),
        torch.tensor([False]), size, MEAN, STD,
    )  # fmt: skip
    dense = pixels[0].permute(2, 0, 1).float()
    dense = dense.repeat_interleave(fine, 1).repeat_interleave(fine, 2)
    y, x = round(top * fine), round(left * fine)
    dense = dense[:, y : y + round(height * fine), x : x + round(width * fine)]
    expected = dense.unflatten(1, (size, -1)).unflatten(3, (size, -1)).mean((2, 4))
    torch.testing.assert_close(out[0], normalised(expected), rtol=1e-4, atol=2e-5)


def test_box_at_a_whole_ratio_is_average_pooling_and_at_one_the_image():
    pixels = images(2, 24, 24)
    whole = torch.tensor([[0.0, 0, 24, 24]]).repeat(2, 1)
    source, flip = torch.tensor([1, 0]), torch.tensor([False, True])
    as_maps = pixels.permute(0, 3, 1, 2).float()
    for size in (8, 24):
        out = crop_resize_normalize(pixels, whole, source, flip, size, MEAN, STD)
        expected = normalised(F.avg_pool2d(as_maps, 24 // size))
        torch.testing.assert_close(out[0], expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[1], expected[0].flip(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("filter", ["box", "bilinear"])
def test_layout_and_constant_images(filter):
    pixels = torch.full((1, 30, 20, 3), 204, dtype=torch.uint8)
    boxes = torch.tensor([[0.3, 0.1, 29.7, 19.9], [4.7, 3.3, 5.1, 8.9]])
    out = crop_resize_normalize(
        pixels, boxes, torch.tensor([0, 0]), torch.tensor([True, False]), 9, MEAN, STD,
        filter,
    )  # fmt: skip
    assert out.shape == (2, 3, 9, 9)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = normalised(torch.full((2, 3, 9, 9), 204.0))
    torch.testing.assert_close(out, expected.contiguous(memory_format=torch.channels_last))


def test_no_boxes_and_an_unknown_filter():
    none = torch.zeros(0, dtype=torch.int64)
    out = crop_resize_normalize(images(), torch.zeros(0, 4), none, none.bool(), 8, MEAN, STD)
    assert out.shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="got filter 'cubic'"):
        crop_resize_normalize(
            images(), torch.zeros(1, 4), none, none.bool(), 8, MEAN, STD,
            filter="cubic",  # type: ignore[arg-type]
        )  # fmt: skip
