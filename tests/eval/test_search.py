"""What the fast search may do: which rows it proposes, in which types and ranges it may err."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.eval.search import neighbors
from letheon.eval.search.neighbors import nearest
from letheon.eval.search.scores import Metric, Scores
from tests.eval.test_knn import METRICS, PROPOSERS, by_definition, clusters


@pytest.mark.parametrize("n", [5, 37, 101, 4001])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_groups_hold_the_largest(n: int, m: int) -> None:
    draw = torch.Generator().manual_seed(n)
    for values in (torch.randn(7, n, generator=draw), torch.randint(4, (7, n), generator=draw)):
        got, columns = neighbors._top(values.float(), m)
        want = values.float().topk(min(m, n), dim=1).values
        assert torch.equal(got.sort(dim=1, descending=True).values, want)
        assert torch.equal(values.float().gather(1, columns), got)
        assert all(len(set(row)) == len(row) for row in columns.tolist())


def test_scores_are_sorted_with_their_positions() -> None:
    draw = torch.Generator().manual_seed(0)
    fast = torch.randn(7, 50, generator=draw) * torch.logspace(-40, 30, 50)
    fast[0, :4] = torch.tensor([0.0, -torch.inf, torch.inf, -1e-45])
    places = torch.stack([torch.randint(-1, 2**26, (50,), generator=draw) for _ in range(7)])
    got, moved = neighbors._descending(fast, places)
    want, order = fast.sort(dim=1, descending=True)
    assert torch.equal(got, want) and torch.equal(moved, places.gather(1, order))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_no_fast_score_errs_by_more_than_the_bound(metric: Metric, dtype: torch.dtype) -> None:
    x, _ = clusters(900, d=300)
    q, _ = clusters(40, d=300, seed=1)
    x = (x * torch.logspace(-1, 1, 900)[:, None] + 3).to(dtype)
    before = x.clone()
    scores = Scores(x, q, metric, Ranks(), (64, 256))
    fast, places = neighbors._propose(scores, 900, torch.float32)
    exact = neighbors._rescore(scores, places, torch.full((40,), 900))
    assert float((fast - exact).abs().max()) < (300 + 8) * 2.0**-24
    assert torch.equal(x, before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e25, 1e35])
def test_numbers_at_the_end_of_the_range(metric: Metric, size: float) -> None:
    x, _ = clusters(400)
    q, _ = clusters(30, seed=1)
    want = by_definition(x, q, 9, metric)
    for backend in PROPOSERS:
        got = nearest(x.double() * size, q.double() * size, 9, metric, backend)
        assert np.array_equal(got.places.numpy(), want)


def test_cosine_of_rows_of_very_different_lengths() -> None:
    x, _ = clusters(400)
    q, _ = clusters(30, seed=1)
    x = x * torch.logspace(-30, 30, 400)[:, None]
    for backend in PROPOSERS:
        got = nearest(x, q, 9, "cosine", backend)
        assert np.array_equal(got.places.numpy(), by_definition(x, q, 9, "cosine"))


def test_more_equal_rows_than_candidates() -> None:
    """Twenty groups of 200 equal rows: no candidates are proven complete."""
    base, _ = clusters(20)
    x = base.repeat(200, 1)
    got = nearest(x, base[:5], 7, "cosine", "torch")
    assert got.places.tolist() == [[row + 20 * i for i in range(7)] for row in range(5)]
    torch.testing.assert_close(got.similarity, torch.ones(5, 7, dtype=torch.float64))
