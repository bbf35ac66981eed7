"""CKA against its definitions in NumPy float64: with Gram matrices, as the papers write them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import InputError, RunFailed
from letheon.eval.metrics.cka import (
    center,
    compare,
    legacy_cka,
    linear_cka,
)

Array = NDArray[np.float64]


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.normal(size=(n, d)) * scale + shift).float()


def biased_hsic(k: Array, el: Array) -> float:
    """Gretton et al. 2005: tr(K H L H), without its constant."""
    h = np.eye(len(k)) - 1 / len(k)
    return float(np.trace(k @ h @ el @ h))


def unbiased_hsic(k: Array, el: Array) -> float:
    """Song et al. 2012, eq. 5, term by term."""
    n = len(k)
    k, el = k - np.diag(np.diag(k)), el - np.diag(np.diag(el))
    one = np.ones(n)
    return float(
        np.trace(k @ el)
        + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ el @ one)
    ) / (n * (n - 3))


def unbiased(x: Tensor, y: Tensor) -> float | None:
    return compare(center("x", x), center("y", y)).unbiased


def by_definition(x: Tensor, y: Tensor, hsic: object = biased_hsic) -> float:
    k, el = (rows.double().numpy() @ rows.double().numpy().T for rows in (x, y))
    return hsic(k, el) / np.sqrt(hsic(k, k) * hsic(el, el))  # type: ignore[operator]


@pytest.mark.parametrize(("n", "p", "q"), [(40, 7, 5), (30, 200, 90), (25, 3, 300), (60, 60, 60)])
def test_exact_and_unbiased_are_their_definitions(n: int, p: int, q: int) -> None:
    x = normal(n, p, 0, shift=3.0)
    y = normal(n, q, 1) + 0.5 * x[:, :1]
    assert linear_cka(x, y) == pytest.approx(by_definition(x, y), abs=1e-10)
    want = by_definition(x, y, unbiased_hsic)
    assert unbiased(x, y) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(50, 20), (30, 80)])
def test_a_rotated_scaled_moved_copy_is_the_same(n: int, d: int) -> None:
    x = normal(n, d, 0)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))
    y = 3.0 * x.double() @ torch.from_numpy(turn) + 7.0
    assert linear_cka(x, y) == pytest.approx(1, abs=1e-12)
    assert unbiased(x, y) == pytest.approx(1, abs=1e-10)


def test_independent_features_are_zero_only_without_bias() -> None:
    x, y = normal(512, 2048, 0), normal(512, 2048, 1)
    assert legacy_cka(x, y) == pytest.approx(0.80, abs=0.01)  # d / (d + n)
    assert linear_cka(x, y) == pytest.approx(0.80, abs=0.01)
    assert unbiased(x, y) == pytest.approx(0, abs=0.01)
    assert compare(center("x", x), center("y", y)).floor == pytest.approx(0.80, abs=0.01)
    x, y = normal(20_000, 16, 2), normal(20_000, 16, 3)
    assert linear_cka(x, y) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (30, 100)])
def test_floor_is_the_mean_value_of_shuffled_rows(n: int, d: int) -> None:
    x, y = normal(n, d, 0), normal(n, d, 1).exp()
    draw = np.random.default_rng(2)
    shuffled = [linear_cka(x, y[torch.from_numpy(draw.permutation(n))]) for _ in range(400)]
    spread = np.std(shuffled) / 400**0.5
    found = compare(center("x", x), center("y", y))
    assert found.floor == pytest.approx(np.mean(shuffled), abs=4 * spread)


def test_legacy_is_a_mean_of_ratios() -> None:
    x = normal(53, 30, 0)
    y = normal(53, 20, 1) + x[:, :20]
    ratios = []
    for start in (0, 20, 40):
        a, b = x[start : start + 20], y[start : start + 20]
        ratios.append(by_definition(a, b))
    assert legacy_cka(x, y, 20) == pytest.approx(np.mean(ratios), abs=1e-9)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(100, 12, 0, shift=50.0), normal(100, 12, 1)
    whole = compare(center("x", x), center("y", y))
    monkeypatch.setattr("letheon.eval.metrics.cka._CHUNK", 7)
    parts = compare(center("x", x), center("y", y))
    assert parts[:3] == pytest.approx(whole[:3], abs=1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    draw = normal(400, 8, 0).double()
    x, y = draw + 1e6, draw.flip(1) + 1e6
    assert linear_cka(x, y) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.7, 1e8])
def test_constant_features_have_no_value_and_say_which(value: float) -> None:
    flat = torch.full((20, 6), value)
    found = compare(center("layer4 of a", normal(20, 6, 0)), center("layer4 of b", flat))
    assert found == (None, None, None, "layer4 of b is constant over the images")
    one = compare(center("a", normal(1, 6, 0)), center("b", normal(1, 6, 1)))
    assert one.value is None and "1 images" in str(one.reason)


def test_small_features_are_not_constant() -> None:
    x = normal(50, 6, 0, scale=1e-12)
    assert linear_cka(x, x) == pytest.approx(1)


def test_features_that_are_not_numbers_name_the_layer() -> None:
    x = normal(20, 6, 0)
    x[4, 2] = float("inf")
    with pytest.raises(RunFailed, match="1 of 20 images in layer3 of the unlearned model"):
        center("layer3 of the unlearned model", x)
    with pytest.raises(InputError, match="20 images in a and 19 in b"):
        compare(center("a", normal(20, 6, 0)), center("b", normal(19, 6, 0)))
