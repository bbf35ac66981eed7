"""Every pass of an evaluation, computed on the host as on a GPU: the CPU's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_budget.cuda_on_host import cuda_on_host
from step_budget.fake_cuda import CUDA
from step_budget.host_reads import find_undeclared
from step_budget.passes import CPU, PASSES, Scene, infer


def near(got: Any, wanted: Any) -> None:
    """Compare numbers to rounding, all else exactly."""
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            near(got[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            near(one, other)
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert got == wanted or str(got) == str(wanted)


SLOW = {"rows"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PASSES]
)
def test_numbers_are_those_of_the_cpu_and_every_look_of_the_host_is_declared(name: str) -> None:
    wanted = PASSES[name](Scene(CPU))
    with cuda_on_host() as ledger:
        got = PASSES[name](Scene(CUDA))
        near(got, wanted)
        undeclared = find_undeclared(ledger.waits)
    assert not undeclared


def test_inference_waits_as_often_for_many_batches_as_for_few() -> None:
    counts = []
    for batch in (5, 20):
        with cuda_on_host() as ledger:
            infer(Scene(CUDA, batch=batch))
            counts.append(dict(ledger.waits))
    assert counts[0] == counts[1]
