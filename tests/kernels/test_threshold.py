"""Masks by global rank against a stable sort of all scores."""

import pytest
import torch

from letheon.kernels.threshold import (
    pack,
    thresholds_by_histogram,
    thresholds_by_sort,
    top_masks,
    unpack,
)

DENSITIES = [0.0, 0.1, 0.25, 0.5, 0.7001, 0.9, 0.999, 1.0]


def by_sort(scores, density):
    """(N,) bool: rank by magnitude, equal ones in order of position."""
    flat = torch.cat([s.reshape(-1).float().abs() for s in scores])
    order = torch.argsort(-flat, stable=True)
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[: round(density * len(flat))]] = True
    return mask


def joined(masks):
    return torch.cat([m.reshape(-1) for m in masks])


def check(scores, densities=DENSITIES):
    for find in (thresholds_by_sort, thresholds_by_histogram):
        for density, masks in zip(densities, top_masks(scores, densities, find), strict=True):
            assert [m.shape for m in masks] == [s.shape for s in scores]
            assert all(m.dtype == torch.bool for m in masks)
            assert torch.equal(joined(masks), by_sort(scores, density)), density


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_a_stable_sort(dtype):
    gen = torch.Generator().manual_seed(0)
    shapes = [(64, 3, 7, 7), (64,), (), (1,), (10, 64), (0, 5)]
    check([(torch.randn(s, generator=gen) * 1e-3).to(dtype) for s in shapes])


def test_ties_go_to_the_lowest_positions_across_tensors():
    gen = torch.Generator().manual_seed(1)
    few = [torch.randint(-2, 3, (n,), generator=gen).float() for n in (100, 1, 57, 300)]
    check(few)
    check([torch.zeros(33), torch.full((7,), -0.0), torch.zeros(60)])


def test_extreme_magnitudes():
    tiny, huge = torch.tensor(1e-45), torch.tensor(3e38)
    check([torch.tensor([0.0, -float("inf"), tiny, -tiny, huge, 1.0]), torch.tensor([huge, -1.0])])


def test_neighbouring_bit_patterns_are_told_apart():
    patterns = torch.arange(0x3F800000, 0x3F800000 + 5000, dtype=torch.int32)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    check([patterns.view(torch.float32)[order]])


@pytest.mark.parametrize("seed", range(20))
def test_random_mixtures(seed):
    gen = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(int(torch.randint(1, 6, (), generator=gen))):
        n = int(torch.randint(0, 200, (), generator=gen))
        values = torch.randn(n, generator=gen) * 10.0 ** torch.randint(-20, 20, (n,), generator=gen)
        scores.append(torch.where(torch.rand(n, generator=gen) < 0.3, values.round(), values))
    check(scores, torch.rand(5, generator=gen).tolist())


def test_large_with_a_channels_last_tensor():
    gen = torch.Generator().manual_seed(3)
    last = torch.randn(256, 256, 3, 3, generator=gen).to(memory_format=torch.channels_last)
    scores = [last, torch.randn(700_001, generator=gen)]
    check(scores, [0.3, 0.5])
    assert top_masks(scores, [0.5])[0][0].stride() == last.stride()


def test_nothing_to_rank():
    assert top_masks([], [0.5]) == [[]]
    assert top_masks([torch.zeros(0)], [0.5])[0][0].shape == (0,)
    assert top_masks([torch.ones(3)], []) == []


def test_bad_input_is_named():
    for find in (thresholds_by_sort, thresholds_by_histogram):
        with pytest.raises(ValueError, match="2 NaN among the 3 scores of tensor 1"):
            top_masks([torch.ones(2), torch.tensor([1.0, torch.nan, -torch.nan])], [0.5], find)
    with pytest.raises(ValueError, match=r"density 1\.5"):
        top_masks([torch.ones(2)], [1.5])
    with pytest.raises(ValueError, match="density nan"):
        top_masks([torch.ones(2)], [float("nan")])


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (3, 5, 7), (), (1000, 33)])
def test_bits_there_and_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.4
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (mask.numel() + 7) // 8
    expected = [
        sum(int(v) << i for i, v in enumerate(mask.reshape(-1)[at : at + 8]))
        for at in range(0, mask.numel(), 8)
    ]
    assert bits.tolist() == expected
    assert torch.equal(unpack(bits, shape), mask)


def test_bits_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"got 2 bytes of mask, expected 3 for the shape \(17,\)"):
        unpack(torch.zeros(2, dtype=torch.uint8), (17,))
