"""Divergences against scipy and their bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.metrics import divergence


def pair(n: int, classes: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(n * 100 + classes)
    return tuple(torch.from_numpy(scale * rng.normal(size=(n, classes))) for _ in range(2))


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
def test_js_is_scipys_squared_distance_in_nats(classes: int) -> None:
    a, b = pair(20, classes)
    p, q = softmax(a.numpy(), axis=1), softmax(b.numpy(), axis=1)
    want = jensenshannon(p, q, axis=1) ** 2 if classes > 1 else np.zeros(20)
    np.testing.assert_allclose(divergence.js_rows(a, b), want, atol=1e-12)
    assert divergence.js(a, b) == pytest.approx(want.mean(), abs=1e-12)


def test_js_is_symmetric_bounded_and_does_not_shrink_with_classes() -> None:
    a, b = pair(30, 7)
    assert divergence.js(a, b) == pytest.approx(divergence.js(b, a), rel=1e-12)
    assert divergence.js(a, a) == pytest.approx(0, abs=1e-15)
    for classes in (2, 10, 1000):
        certain = torch.zeros(4, classes)
        other = certain.clone()
        certain[:, 0], other[:, 1] = 1e4, 1e4
        assert divergence.js(certain, other) == pytest.approx(np.log(2))
        assert divergence.zrf(certain, other) == pytest.approx(1 - np.log(2))


def test_rows_are_independent_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(11, 3)
    whole = divergence.js_rows(a, b)
    monkeypatch.setattr(divergence, "_ROWS", 4)
    torch.testing.assert_close(divergence.js_rows(a, b), whole, rtol=1e-13, atol=1e-15)


def test_activation_distance_and_completeness() -> None:
    a, b = pair(50, 4)
    p, q = softmax(a.numpy(), axis=1), softmax(b.numpy(), axis=1)
    want = np.sqrt(((p - q) ** 2).sum(1)).mean()
    assert divergence.activation_distance(a, b) == pytest.approx(want)
    assert divergence.completeness(a, b) == (p.argmax(1) == q.argmax(1)).mean()
    ties = torch.zeros(3, 4)
    assert divergence.completeness(ties, ties) == 1
    assert divergence.completeness(ties[:1], torch.tensor([[0.0, 1, 0, 0]])) == 0


def test_bad_tables_are_the_users_error() -> None:
    a, b = pair(5, 3)
    with pytest.raises(InputError, match="shapes"):
        divergence.js(a, b[:4])
    with pytest.raises(NotMeasurable, match="no samples"):
        divergence.js(a[:0], b[:0])
    with pytest.raises(RunFailed, match="NaN"):
        divergence.completeness(a, b * float("nan"))
