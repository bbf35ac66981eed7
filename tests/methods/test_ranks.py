"""The number of ranks changes nothing: same losses, same weights, for every method."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.methods import METHODS as OURS
from letheon.methods.finetune import Finetune
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.influence import conjugate_gradients
from letheon.methods.spkd import Spkd
from tests.marks import slow_but
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import run_of, trained, weights

# Batches of 7 over 41 images: uneven on 2 and on 3 ranks, and a shared rest.
FROZEN = Recipe(epochs=2, lr=0.05, batch_size=7, batch_norm="frozen")
GENTLE = replace(FROZEN, lr=0.005)
METHODS = cases(FROZEN, GENTLE)
# float32 sums in another order; 10 to 20 steps at these rates. Observed up to 3e-6.
TOLERANCE = 2e-5


def end(ranks: Ranks, name: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    run, lines = trained(METHODS[name], ranks)
    return weights(run), [float(str(line["loss"])) for line in lines if "loss" in line]


def test_every_method_has_a_case() -> None:
    assert {method.name for method in METHODS.values()} == set(OURS)


# Three ranks are the harder case: every third method; two for a few. The others are slow tests.
ON_TWO = ("finetune", "grad-ascent", "spkd", "salun", "ssd", "scrub", "retrain")
ON_THREE = [*METHODS][::3]
CASES = [(world, name) for world in (3, 2) for name in METHODS]
QUICK = [(3, name) for name in ON_THREE] + [(2, name) for name in ON_TWO]


@cache
def end_alone(name: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    return end(Ranks(), name)


@pytest.mark.parametrize("case", slow_but(QUICK, CASES), ids=str)
def test_ranks_end_as_one_rank(case: tuple[int, str]) -> None:
    world, name = case
    alone, losses = end_alone(name)
    together = on_ranks(world, end, name)
    for theirs, their_losses in together:
        assert all(torch.equal(theirs[key], together[0][0][key]) for key in theirs)
        for key, value in alone.items():
            torch.testing.assert_close(theirs[key], value, atol=TOLERANCE, rtol=0, msg=key)
        torch.testing.assert_close(
            torch.tensor(their_losses), torch.tensor(losses), atol=TOLERANCE, rtol=TOLERANCE
        )


@pytest.mark.parametrize("world", [2, 3])
def test_one_flat_buffer_ends_as_one_rank(world: int) -> None:
    alone, _ = end(Ranks(), "salun")
    for theirs in on_ranks(world, end_flat):
        for key, value in alone.items():
            torch.testing.assert_close(theirs[key], value, atol=TOLERANCE, rtol=0, msg=key)


def end_flat(ranks: Ranks) -> dict[str, torch.Tensor]:
    run = run_of(METHODS["salun"], ranks)
    run.precision = Precision("fp32", reduce="flat")
    run_method(METHODS["salun"], run)
    return weights(run)


FEW = {
    "grad-ascent": METHODS["grad-ascent"],
    "random-label-sequential": METHODS["random-label-sequential"],
    "salun": METHODS["salun"],
    "accumulating": GradAscent(replace(GENTLE, grad_accum_steps=2)),
    "local batch-norm": GradAscent(replace(GENTLE, batch_norm="local"), forget_batch_norm="recipe"),
}


def end_few(ranks: Ranks, name: str, forgotten: int) -> dict[str, torch.Tensor]:
    run = run_of(FEW[name], ranks, forgotten=range(forgotten))
    run_method(FEW[name], run)
    return weights(run)


@pytest.mark.parametrize("forgotten", [1, 2])
def test_fewer_forget_samples_than_ranks(forgotten: int) -> None:
    """Some ranks have no part of a batch: the end is that of one rank, statistics included."""
    for name in FEW:
        alone = end_few(Ranks(), name, forgotten)
        for theirs in on_ranks(3, end_few, name, forgotten):
            for key, value in alone.items():
                if forgotten > 1 and name == "local batch-norm":
                    continue  # each rank normalizes by its own sample
                torch.testing.assert_close(theirs[key], value, atol=TOLERANCE, rtol=0, msg=key)


def refusal(ranks: Ranks) -> str:
    method = Spkd(replace(FROZEN, batch_size=3))
    try:
        method.check(run_of(method, ranks, forgotten=range(40)))
    except InputError as error:
        return str(error)
    return ""


def test_similarities_over_a_batch_need_a_sample_a_rank() -> None:
    assert all("fewer samples than 2 ranks" in text for text in on_ranks(2, refusal))


def products(ranks: Ranks) -> int:
    """How many a rank needs, of which the second alone would need two."""
    count, scales = [0], torch.tensor([1.0, 1.0 + ranks.rank])

    def apply(vector: list[torch.Tensor]) -> list[torch.Tensor]:
        count[0] += 1
        return [vector[0] * scales]

    conjugate_gradients(apply, [torch.ones(2)], 5, 1e-6, run_of(Finetune(FROZEN), ranks))
    return count[0]


def test_conjugate_gradients_end_on_all_ranks_at_once() -> None:
    """A product sums over the ranks, and one rank that goes on alone would wait for ever."""
    assert on_ranks(2, products) == [1, 1]


def test_local_batch_norm_ends_equal_on_the_ranks() -> None:
    results = on_ranks(2, end_local)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def end_local(ranks: Ranks) -> dict[str, torch.Tensor]:
    run, _ = trained(Finetune(replace(FROZEN, batch_norm="local")), ranks)
    return weights(run)
