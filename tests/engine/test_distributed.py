"""Sums, gathered rows and agreement over ranks, and the gradient statistics made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, agree, gather_rows, require_equal, sum_over_ranks
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import gradient_sum
from letheon.errors import InputError, RunFailed
from letheon.loaders.order import share
from letheon.methods.finetune import Finetune, cross_entropy
from tests.pool import on_ranks
from tests.world import run_of


def sums(ranks: Ranks) -> list[Tensor]:
    tensors = [
        torch.full((2, 3), float(ranks.rank + 1)).t(),
        torch.arange(4) + ranks.rank,
        torch.tensor(0.5, dtype=torch.float64),
    ]
    sum_over_ranks(tensors, ranks)
    return tensors


def test_sums_keep_shapes_and_dtypes() -> None:
    for a, b, c in on_ranks(3, sums):
        assert torch.equal(a, torch.full((3, 2), 6.0))
        assert torch.equal(b, 3 * torch.arange(4) + 3)
        assert c.dtype == torch.float64 and c == 1.5


def rows(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.arange(ranks.rank * 2, dtype=torch.float32).reshape(-1, 1) + 10 * ranks.rank
    flags = torch.ones(ranks.rank, dtype=torch.bool)
    mine = torch.arange(7)[share(7, ranks.rank, ranks.world)]
    return gather_rows(own, ranks), gather_rows(flags, ranks), gather_rows(mine, ranks, total=7)


def test_rows_come_in_rank_order_from_ranks_with_different_counts() -> None:
    for values, flags, known in on_ranks(3, rows):
        assert values.flatten().tolist() == [10, 11, 20, 21, 22, 23]
        assert flags.dtype == torch.bool and len(flags) == 3
        assert known.tolist() == list(range(7))


def disagree(ranks: Ranks) -> str:
    try:
        agree(ranks, "got a bad list" if ranks.rank == 1 else None)
    except InputError as error:
        return str(error)
    return ""


def differ(ranks: Ranks) -> str:
    require_equal(ranks, "weights", "same")
    try:
        require_equal(ranks, "weights", str(ranks.rank == 2))
    except RunFailed as error:
        return str(error)
    return ""


def test_one_ranks_problem_is_everybodys() -> None:
    assert on_ranks(3, disagree) == ["got a bad list"] * 3
    assert all("ranks [2]" in text for text in on_ranks(3, differ))


def gradients(ranks: Ranks, batch_size: int) -> list[Tensor]:
    run = run_of(Finetune(Recipe(batch_size=batch_size)), ranks)
    return gradient_sum(run, "forget", cross_entropy)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradient_sums_do_not_depend_on_ranks_or_batches(world: int) -> None:
    expected = gradients(Ranks(), 41)
    results = on_ranks(world, gradients, 4)
    for result in results:
        for ours, theirs, first in zip(result, expected, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            assert torch.equal(ours, first)
