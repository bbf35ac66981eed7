"""Every method on a GPU: in float64 the CPU's weights; compiled in bf16 the losses; resumes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from tests.engine.resume_tools import BreakAt, attempt
from tests.methods.cases import cases
from tests.methods.plain import run_in_doubles, train_in_doubles
from tests.world import run_of, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RECIPE = Recipe(epochs=2, lr=0.05, batch_size=7, batch_norm="frozen")
METHODS = cases(RECIPE, replace(RECIPE, lr=0.005))
COMPILED = ("finetune", "grad-ascent", "salun", "spkd", "l1-sparse", "neg-grad-plus")
RESUMED = (*COMPILED, "scrub", "sfron", "bad-teacher", "unsir", "dual-optim", "amun")


def gpu() -> Ranks:
    return Ranks(device=torch.device("cuda", 0))


@pytest.mark.parametrize("name", METHODS)
def test_float64_ends_as_on_the_cpu(name: str) -> None:
    """The sums run in another order: 10 to 20 steps at these rates leave 1e-9."""
    ends = []
    for ranks in (gpu(), Ranks()):
        run = run_in_doubles(METHODS[name], ranks)
        run.precision = Precision("fp32")  # no teacher in bf16, no tf32
        train_in_doubles(METHODS[name], run)
        ends.append(weights(run))
    assert all(value.is_cuda for value in ends[0].values())
    for key, value in ends[1].items():
        torch.testing.assert_close(ends[0][key].cpu(), value, atol=1e-9, rtol=1e-9, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_float32_ends_near_the_cpu(name: str) -> None:
    ends = []
    for ranks in (gpu(), Ranks()):
        run = run_of(METHODS[name], ranks)
        run.precision = Precision("fp32")
        run_method(METHODS[name], run)
        ends.append(weights(run))
    for key, value in ends[1].items():
        torch.testing.assert_close(ends[0][key].cpu(), value, atol=1e-3, rtol=1e-3, msg=key)


@pytest.mark.parametrize("reduce", ["auto", "flat"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_in_bf16_has_the_losses_of_float32(name: str, reduce: str) -> None:
    losses = []
    for precision in (Precision("bf16", compile="default"), Precision("fp32")):
        run = run_of(METHODS[name], gpu())
        run.precision = replace(precision, reduce=reduce)  # type: ignore[arg-type]
        lines: list[float] = []

        def log(kind: str, into: list[float] = lines, **facts: object) -> None:
            if kind == "phase":
                into.append(float(str(facts["loss"])))

        run_method(METHODS[name], run, log)
        losses.append(torch.tensor(lines))
    torch.testing.assert_close(losses[0], losses[1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_bit_for_bit(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    make = partial(run_of, method, gpu())
    whole = attempt(method, make, tmp_path / "whole", BreakAt(gpu(), 1, 10**6), False)
    stopped = attempt(method, make, tmp_path / "run", BreakAt(gpu(), 1, 3), False)
    assert whole is not None and stopped is None
    again = attempt(method, make, tmp_path / "run", BreakAt(gpu(), 1, 10**6), True)
    assert again is not None
    for key, value in whole[0].items():
        assert torch.equal(again[0][key], value), key
