"""Every method's whole run, computed on the host as on a GPU: the CPU's weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from step_budget.cuda_on_host import CudaTensor, cuda_on_host
from step_budget.fake_cuda import CUDA
from step_budget.host_reads import find_undeclared

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Run
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from tests.marks import slow_but
from tests.methods.cases import cases
from tests.world import run_of, weights

RECIPE = Recipe(epochs=1, lr=0.05, batch_size=11, batch_norm="frozen")
CASES = cases(RECIPE, replace(RECIPE, lr=0.005))
QUICK = (
    "salun", "boundary-expanding", "fisher", "esc", "scar", "amun", "cmf", "l2ul", "spotter",
    "unsir", "task-vector",
)  # fmt: skip
"""Those whose preparations differ most: sums, images, surgery, copies."""


def run_on(name: str, ranks: Ranks) -> Run:
    """The run after its end."""
    run = run_of(CASES[name], ranks)
    run.precision = Precision("fp32")
    run_method(CASES[name], run)
    return run


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_a_run_ends_as_on_the_cpu_and_every_look_of_the_host_is_declared(name: str) -> None:
    expected = weights(run_on(name, Ranks()))
    with cuda_on_host() as ledger:
        run = run_on(name, Ranks(device=CUDA))
        undeclared = find_undeclared(ledger.waits)
        assert all(isinstance(value, CudaTensor) for value in weights(run).values())
        for key, value in weights(run).items():
            torch.testing.assert_close(value.cpu(), expected[key], rtol=1e-5, atol=1e-5, msg=key)
    assert not undeclared
