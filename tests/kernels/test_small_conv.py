"""Convolution as products against torch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from letheon.kernels.small_conv import output_size, small_conv2d, taps

LAST = torch.channels_last
SHAPES = [  # images, channels in and out, size, kernel, stride, padding
    (3, 5, 7, (2, 2), (3, 3), (1, 1), (1, 1)),
    (3, 5, 7, (4, 4), (3, 3), (2, 2), (1, 1)),
    (2, 4, 6, (4, 3), (1, 1), (2, 2), (0, 0)),
    (2, 4, 6, (3, 2), (1, 1), (1, 1), (0, 0)),
    (2, 3, 4, (1, 1), (3, 3), (1, 1), (1, 1)),
    (2, 3, 4, (5, 4), (2, 3), (2, 1), (0, 1)),
    (2, 3, 4, (3, 3), (3, 1), (3, 2), (2, 0)),
    (2, 3, 4, (1, 2), (3, 3), (1, 1), (4, 3)),  # positions that see padding alone
    (1, 1, 1, (2, 2), (2, 2), (1, 1), (0, 0)),
    (0, 3, 4, (2, 2), (3, 3), (1, 1), (1, 1)),
    (0, 3, 4, (2, 2), (1, 1), (1, 1), (0, 0)),
]


def made(shape, dtype, last=True, bias=True):
    n, c, d, size, kernel, stride, padding = shape
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, *size, generator=gen).to(dtype)
    w = torch.randn(d, c, *kernel, generator=gen).to(dtype)
    b = torch.randn(d, generator=gen).to(dtype) if bias else None
    if last:
        x, w = x.to(memory_format=LAST), w.to(memory_format=LAST)
    return x, w, b, stride, padding


def both(x, w, b, stride, padding):
    """Value and gradients of ours and of torch's in float64, from the same numbers."""
    found = []
    for way in (small_conv2d, F.conv2d):
        kind = x.dtype if way is small_conv2d else torch.float64
        given = [None if t is None else t.detach().to(kind).requires_grad_() for t in (x, w, b)]
        y = way(*given, stride, padding)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
        leaves = [t for t in given if t is not None]
        found.append([y, *torch.autograd.grad(y, leaves, weight.to(kind))])
    return zip(*found, strict=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape, last, bias):
    for ours, theirs in both(*made(shape, torch.float64, last, bias)):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_the_formats_of_training(shape, dtype, tolerance):
    for ours, theirs in both(*made(shape, dtype)):
        assert ours.dtype == dtype
        largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * (largest + 1e-9))


def test_the_answer_and_the_gradients_are_channels_last():
    x, w, b, stride, padding = made(SHAPES[0], torch.float32)
    x.requires_grad_(), w.requires_grad_()
    y = small_conv2d(x, w, b, stride, padding)
    assert y.is_contiguous(memory_format=LAST)
    for gradient, leaf in zip(torch.autograd.grad(y.sum(), (x, w)), (x, w), strict=True):
        assert gradient.stride() == leaf.stride()


def test_only_what_is_asked_for_has_a_gradient():
    x, w, b, stride, padding = made(SHAPES[0], torch.float32)
    w.requires_grad_()
    small_conv2d(x, w, b, stride, padding).sum().backward()
    assert w.grad is not None and x.grad is None


def test_no_tap_meets_padding():
    for _, _, _, size, kernel, stride, padding in SHAPES:
        high, wide = output_size(size, kernel, stride, padding)
        for tap in taps(size, kernel, stride, padding):
            assert 0 <= tap.out < high * wide and 0 <= tap.row < size[0]
            assert 0 <= tap.first < tap.last <= size[1]
            assert tap.last - tap.first == tap.kernel_last - tap.kernel_first


def test_what_does_not_fit_is_refused():
    x, w = torch.randn(2, 4, 2, 2), torch.randn(6, 2, 3, 3)
    with pytest.raises(ValueError, match="2 channels"):  # as for two groups
        small_conv2d(x, w, None, (1, 1), (1, 1))
    with pytest.raises(ValueError, match="does not fit"):
        small_conv2d(x, torch.randn(6, 4, 3, 3), None, (1, 1), (0, 0))
