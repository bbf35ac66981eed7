"""One forget sample on three ranks, by every method: it ends as on one rank, or every rank refuses.

A deletion request is often one image, and two of three ranks then have no part of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from tests.marks import slow_but
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import run_of, weights

FROZEN = Recipe(epochs=1, lr=0.005, batch_size=7, batch_norm="frozen")
METHODS = cases(FROZEN, replace(FROZEN, lr=0.001))
# As of tests/methods/test_ranks.py: float32 sums in another order.
TOLERANCE = 2e-5
# By definition, or because every rank has to add to a loss over the whole batch.
REFUSED = {
    "head-distillation": "whole classes",
    "unsir": "whole classes",
    "sfron": "fewer samples than 3 ranks",
    "spotter": "fewer samples than 3 ranks",
}


def end(ranks: Ranks, name: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The refusal, if any, and the weights."""
    method = METHODS[name]
    run = run_of(method, ranks, forgotten=(3,))
    run.held_out = lambda: run.loader
    try:
        method.check(run)
    except InputError as error:
        return str(error), {}
    run_method(method, run)
    return "", weights(run)


# Of those that do not refuse, every sixth; the others are slow.
FEW = {*REFUSED, *[*METHODS][::6]}


@pytest.mark.parametrize("name", slow_but(FEW, METHODS))
def test_one_forget_sample_on_three_ranks(name: str) -> None:
    text, alone = end(Ranks(), name)
    assert bool(text) == (REFUSED.get(name) == "whole classes"), text
    for theirs, values in on_ranks(3, end, name):
        assert bool(theirs) == (name in REFUSED), theirs
        assert "\n" not in theirs and REFUSED.get(name, "") in theirs
        if not theirs:
            for key, value in alone.items():
                torch.testing.assert_close(values[key], value, atol=TOLERANCE, rtol=0, msg=key)
