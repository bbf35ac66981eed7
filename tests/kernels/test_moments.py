"""Streamed CKA against its definition, and unbiased HSIC against its formula."""

import pytest
import torch

from letheon.kernels.moments import BatchHsic, Moments, centred_grams


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cka_by_definition(x, y):
    x, y = (f.double() - f.double().mean(0) for f in (x, y))
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def features(n=203, dtype=torch.float64):
    x = randn(n, 9, seed=0)
    y = x[:, :5] + 0.7 * randn(n, 5, seed=1)
    return x.to(dtype) + 3, y.to(dtype) - 50, x[:, :2].to(dtype) * 1e-3


@pytest.mark.parametrize("products", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shifted", [False, True])
def test_equals_the_definition_whatever_the_batches(products, dtype, shifted):
    blocks = features(dtype=dtype)
    shift = torch.cat([b[:20] for b in blocks], 1).mean(0) if shifted else None
    moments = Moments([9, 5, 2], shift=shift, products=products)
    for part in (slice(0, 1), slice(1, 100), slice(100, 100), slice(100, 203)):
        moments.add(*(b[part] for b in blocks))
    good = products == torch.float64
    for i in range(3):
        for j in range(3):
            expected = cka_by_definition(blocks[i], blocks[j])
            tolerance = 1e-9 if good else 1e-5 if shifted else 1e-2
            assert float(moments.cka(i, j)) == pytest.approx(expected, abs=tolerance)


def test_ranks_add_up_to_one_pass():
    blocks = features()
    whole, parts = Moments([9, 5, 2]), [Moments([9, 5, 2]) for _ in range(3)]
    whole.add(*blocks)
    for rank, part in enumerate(parts):
        part.add(*(b[rank::3] for b in blocks))
    for tensors in zip(*(p.tensors() for p in parts), strict=True):
        tensors[0].add_(tensors[1]).add_(tensors[2])
    assert float(parts[0].cka(0, 1)) == pytest.approx(float(whole.cka(0, 1)), rel=1e-12)


def test_known_values():
    x = randn(500, 20, seed=2)
    rotation = torch.linalg.qr(randn(20, 20, seed=3))[0]
    moments = Moments([20, 20, 20, 3])
    constant = torch.full((500, 3), 0.1, dtype=torch.float32)
    moments.add(x, 7 * x @ rotation - 4, randn(500, 20, seed=4), constant)
    assert float(moments.cka(0, 1)) == pytest.approx(1, abs=1e-12)
    assert float(moments.cka(0, 2)) == pytest.approx(20 / 520, abs=0.02)
    assert moments.cka(0, 3).isnan()
    assert moments.cka(3, 3).isnan()


def hsic_by_formula(x, y):
    """The unbiased HSIC of Song et al. (2012), with traces and vectors of ones."""
    n = len(x)
    k, m = (f.flatten(1) @ f.flatten(1).T for f in (x, y))
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    one = torch.ones(n, dtype=x.dtype)
    trace = torch.trace(k @ m)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((trace + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


@pytest.mark.parametrize("n", [4, 5, 31])
def test_hsic_of_all_pairs_equals_the_formula(n):
    xs = [randn(n, 6, seed=0) + 2, randn(n, 3, 4, 4, seed=1), randn(n, seed=5)]
    ys = [xs[0][:, :3] * 2, randn(n, 2, seed=2)]
    pairs = centred_grams(xs) @ centred_grams(ys).T
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            x, y = (f[:, None] if f.dim() == 1 else f for f in (x, y))
            assert float(pairs[i, j]) == pytest.approx(hsic_by_formula(x, y), rel=1e-9, abs=1e-12)


def test_minibatch_cka_is_a_ratio_of_sums():
    batches = [(randn(n, 5, seed=n), randn(n, 4, seed=n + 1) + 1) for n in (8, 30, 12)]
    layers = BatchHsic(1, 1)
    for x, y in batches:
        layers.add([x], [torch.cat([x[:, :2], y], 1)])
    sums = [0.0, 0.0, 0.0]
    for x, y in batches:
        y = torch.cat([x[:, :2], y], 1)
        for i, (a, b) in enumerate(((x, y), (x, x), (y, y))):
            sums[i] += hsic_by_formula(a, b)
    assert float(layers.cka()[0, 0]) == pytest.approx(sums[0] / (sums[1] * sums[2]) ** 0.5)


def test_minibatch_cka_of_independent_features_is_zero_and_of_a_rotation_one():
    layers = BatchHsic(2, 1)
    for step in range(60):
        x = randn(24, 40, seed=step, dtype=torch.float32)
        rotation = torch.linalg.qr(randn(40, 40, seed=7, dtype=torch.float32))[0]
        layers.add([x, randn(24, 40, seed=1000 + step)], [x @ rotation])
    cka = layers.cka()[:, 0].tolist()
    assert cka[0] == pytest.approx(1, abs=1e-5)
    assert cka[1] == pytest.approx(0, abs=0.05)


def test_too_small_a_batch_is_refused():
    with pytest.raises(ValueError, match="got a batch of 3 samples"):
        BatchHsic(1, 1).add([torch.randn(3, 2)], [torch.randn(3, 2)])
