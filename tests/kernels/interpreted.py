"""Triton forms against the plain forms, on the CPU; test_triton.py runs this file.

It needs TRITON_INTERPRET=1 from the start of the process, so pytest does not collect it by itself.
Shapes are tiny: the interpreter runs one program after another in Python.
"""

import os

import pytest
import torch

from letheon.kernels import augment, takes_triton
from letheon.kernels.augment_reference import crop_resize_normalize_reference
from letheon.kernels.flat import Layout
from letheon.kernels.masked_sgd import masked_sgd_
from letheon.kernels.masked_sgd_reference import masked_sgd_reference_
from letheon.kernels.threshold import pack


def test_the_public_functions_take_the_triton_path():
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert takes_triton(torch.zeros(1))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masked_step(packed, momentum):
    n = 2051
    gen = torch.Generator().manual_seed(0)
    start, grad, buffer = (torch.randn(n, generator=gen) for _ in range(3))
    start[:9], start[9:20] = -0.0, 0.0
    keep = torch.rand(n, generator=gen) < 0.5
    grad[~keep] = torch.tensor([torch.nan, torch.inf]).repeat(n)[:n][~keep]
    masks = [pack(keep) if packed else keep]
    results = []
    for form in (masked_sgd_, masked_sgd_reference_):
        p, b = start.clone(), buffer.clone()
        for rate, skip in ((0.1, None), (torch.tensor(0.2), 0.0), (0.3, 1.0)):
            skipped = None if skip is None else torch.tensor(skip)
            form([p], [grad], [b], masks, rate, momentum, 0.05, skipped)
        results.append((p, b))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(results[0][0].view(torch.int32)[~keep], start.view(torch.int32)[~keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_masked_step_on_shapes_and_layouts(dtype):
    gen = torch.Generator().manual_seed(1)
    shapes = [(5, 3, 3, 3), (5, 3, 3, 3), (), (0, 4), (1025,)]
    groups = [[torch.randn(s, generator=gen) for s in shapes] for _ in range(4)]
    params, grads, momenta, scores = groups
    for tensors in (params, grads, momenta, scores):
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    grads[1] = grads[1].contiguous(memory_format=torch.channels_last)  # unlike its parameter
    grads = [g.to(dtype) for g in grads]
    masks = [s > 0 for s in scores]
    results = []
    for form in (masked_sgd_, masked_sgd_reference_):
        ours, buffers = [p.clone() for p in params], [m.clone() for m in momenta]
        form(ours, grads, buffers, masks, 0.1, 0.9, 0.05)
        results.append(ours + buffers)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_masked_step_on_a_flat_buffer():
    gen = torch.Generator().manual_seed(2)
    tensors = [torch.randn(s, generator=gen) for s in ((3, 2, 3, 3), (7,), (70,))]
    layout = Layout.of(tensors)
    grad, keep = torch.randn(layout.length, generator=gen), [t > 0 for t in tensors]
    flats = []
    for form in (masked_sgd_, masked_sgd_reference_):
        flat = layout.gather(tensors)
        form(
            [flat], [grad], [torch.zeros(layout.length)], [layout.bits(keep)], 0.1, weight_decay=0.1
        )
        flats.append(flat)
    torch.testing.assert_close(flats[0], flats[1])


@pytest.mark.parametrize(
    ("filter", "size"), [("box", 3), ("box", 24), ("bilinear", 7), ("bilinear", 24)]
)
def test_augment(filter, size):
    gen = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (3, 20, 26, 3), dtype=torch.uint8, generator=gen)
    boxes = torch.tensor([[3.2, 5.7, 10, 15.5], [0, 0, 20, 26], [10, 10, 7, 9.5], [19, 25, 1, 1]])
    source, flip = torch.tensor([2, 0, 1, 1]), torch.tensor([False, True, False, True])
    arguments = (images, boxes, source, flip, size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    ours = augment.crop_resize_normalize(*arguments, filter=filter)
    expected = crop_resize_normalize_reference(*arguments, filter=filter)
    assert ours.stride() == expected.stride()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_augment_refuses_images_it_would_have_to_copy():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1)
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="got images with strides"):
        augment.crop_resize_normalize(
            images, torch.tensor([[0.0, 0, 8, 8]]), one, one.bool(), 4, (0, 0, 0), (1, 1, 1)
        )
