"""Every pass of an evaluation, computed on the host as on a GPU: the CPU's numbers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from step_budget.cuda_on_host import cuda_on_host
from step_budget.fake_cuda import CUDA
from step_budget.host_reads import PLACES, find_growing, find_undeclared
from step_budget.passes import CPU, PASSES, Scene

from letheon.eval.probes.relearn import find_rate
from tests.marks import slow_but


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


@pytest.mark.parametrize("name", slow_but({"critic"}, PASSES))
def test_numbers_are_those_of_the_cpu_and_every_look_of_the_host_is_declared(name: str) -> None:
    wanted = PASSES[name](Scene(CPU))
    with cuda_on_host() as ledger:
        got = PASSES[name](Scene(CUDA))
        near(got, wanted)
        undeclared = find_undeclared(ledger.waits)
    assert not undeclared
    with cuda_on_host() as smaller:
        PASSES[name](Scene(CUDA, batch=3))
    assert find_growing(ledger.waits, smaller.waits) == []


def names(node: ast.AST, within: str = "") -> Iterator[str]:
    """Qualified names of the functions below a node, as `Ledger` has them."""
    for child in ast.iter_child_nodes(node):
        name = within
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield within + child.name
            name += f"{child.name}."
        yield from names(child, name)


def test_every_place_that_may_wait_is_a_function_that_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    gone = []
    for place in PLACES:
        file, function = place.split(":")
        path = root / file
        if not path.is_file() or function not in names(ast.parse(path.read_text())):
            gone.append(place)
    assert gone == []


def test_a_wait_that_grows_with_the_batches_is_a_fault_unless_it_is_declared_so() -> None:
    once = "eval/inference/extract.py:_on_host aten::_to_copy"
    each = "eval/evaluate.py:read_images aten::_to_copy"
    assert find_growing({once: 1, each: 1}, {once: 1, each: 3}) == []
    assert find_growing({once: 1, each: 1}, {once: 2, each: 3}) == [once]


def test_what_a_gpu_refuses_is_refused_and_what_waits_is_counted_by_who_asked() -> None:
    with cuda_on_host() as ledger:
        rows, row = torch.ones(3, 4, device=CUDA), torch.ones(4)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            rows + row
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            rows.numpy()
        assert rows.device == CUDA and rows.sum().cpu() == 12
        mask = torch.tensor([True, False, True], device=CUDA)
        ledger.clear()
        assert len(rows[mask]) == 2
        rows.mul_(torch.tensor(2.0)).add_(1)  # a number of the host is an argument of the kernel
        row.pin_memory().to(CUDA, non_blocking=True)
        assert dict(ledger.waits) == {"aten::index": 1}
        row.to(CUDA, non_blocking=True)  # not pinned
        assert rows.tolist() == [[3.0] * 4] * 3
        assert ledger.waits["aten::_to_copy between host and device"] == 2
        layer = torch.nn.Linear(4, 2).to(CUDA)
        layer(rows).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.device == CUDA
        find_rate(layer, lambda step: (rows, torch.zeros(3, dtype=torch.int64, device=CUDA)))
        place = "eval/probes/relearn.py:find_rate aten::_local_scalar_dense"
        assert ledger.waits[place] > 0 and find_undeclared(
            {place: 1, "eval/x.py:f aten::a": 1}
        ) == ["eval/x.py:f aten::a"]
    assert not torch.cuda.is_initialized()
