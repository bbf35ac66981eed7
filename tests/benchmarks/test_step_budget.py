"""CUDA without CUDA: every method's whole step on fake tensors, and what is an error there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from step_budget.fake_cuda import CUDA, fake_cuda
from step_budget.stands import Stand, build_stand, count_graphs, fake_stand
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.finetune import Finetune
from letheon.methods.spkd import Spkd
from tests.methods.cases import cases
from tests.world import PRESET, network, run_of

RECIPE = Recipe(epochs=1, lr=0.01, batch_size=8, batch_norm="frozen")
GROUPS = dataclasses.replace(RECIPE, batch_norm="local", batch_norm_group=4)
CASES = cases(RECIPE) | {"batch-norm groups": Finetune(GROUPS)}


def stand_of(name: str) -> Stand:
    run = run_of(CASES[name])
    return Stand(CASES[name], run, CASES[name].prepare(run) or State(), PRESET.size)


@pytest.mark.slow
def test_no_method_waits_for_the_host_or_leaves_the_device() -> None:
    seen, problems = 0, []
    for name in CASES:
        stand = stand_of(name)
        with fake_stand(stand) as (fake, ledger):
            step = fake.step()
            for phase in fake.phases():
                other = None if phase.beside is None else fake.batch(8, phase.beside)
                try:
                    one = fake.begin(step, phase)
                    batch = fake.batch(8, phase)
                    one.take(batch, other)
                    ledger.clear()
                    one.take(batch, other)
                except Exception as error:
                    problems.append(f"{name}, {phase.name}: {type(error).__name__} {error}")
                problems += [f"{name}, {phase.name}: {wait}" for wait in ledger.waits]
                assert ledger.launches > 20
                assert {p.device for p in fake.run.model.parameters()} == {CUDA}
                seen += 1
    assert not problems, "\n".join(problems)
    assert seen > 40


def look(value: Callable[[Tensor, Batch], object]) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss that looks at something."""

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        logits = net(batch.images).logits
        value(logits, batch)
        return F.cross_entropy(logits, batch.labels)

    return loss


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (lambda logits, batch: logits.sum().item(), "DataDependentOutputException"),
        (lambda logits, batch: bool((logits > 0).all()), "DataDependentOutputException"),
        (lambda logits, batch: logits[batch.forget], "DynamicOutputShapeException"),
        (lambda logits, batch: logits + torch.zeros(4), "FakeTensorDeviceMismatchError"),
    ],
)
def test_what_would_wait_or_fail_on_a_gpu_fails_here(
    value: Callable[[Tensor, Batch], object], error: str
) -> None:
    with fake_stand(stand_of("finetune")) as (fake, _):
        phase = dataclasses.replace(fake.phases()[0], loss=look(value))
        one = fake.begin(fake.step(), phase)
        with pytest.raises(Exception, match=".") as caught:
            one.take(fake.batch(8, phase))
    assert type(caught.value).__name__ == error


def test_copies_from_the_host_are_waits_and_the_ledger_adds_up() -> None:
    with fake_cuda() as ledger:
        torch.zeros(3, device=CUDA).add_(torch.ones(3).to(CUDA))
        assert ledger.waits.total() == 1
        ledger.clear()
        torch.ones(3).to(CUDA, non_blocking=True)
        assert not ledger.waits
        ledger.clear()
        a, b = torch.empty(8, 16, device=CUDA), torch.empty(16, 4, device=CUDA)
        (a @ b).T.reshape(-1)
        assert ledger.kernels["aten::mm"] == 1
        ledger.clear()
        a @ b
        assert (ledger.launches, ledger.bytes) == (1, 4 * (8 * 16 + 16 * 4 + 8 * 4))


def test_one_graph_a_phase_in_every_epoch_and_a_break_is_seen() -> None:
    recipe = dataclasses.replace(RECIPE, batch_size=8)
    for method in (Finetune(recipe), Spkd(recipe), CASES["salun"]):
        stand = build_stand(method, network(classes=10), 8, torch.device("cpu"), Precision("fp32"))
        for phase in stand.phases():
            assert count_graphs(stand, phase) == (1, ""), method
    stand = stand_of("finetune")
    phase = stand.phases()[0]
    broken = dataclasses.replace(phase, loss=look(lambda *_: torch._dynamo.graph_break()))
    count, reason = count_graphs(stand, broken)
    assert count == 0 and reason
