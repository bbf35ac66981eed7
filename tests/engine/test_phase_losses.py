"""The loss of a phase is that of its epoch, as a method's author writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from letheon.engine.compiled import held_numbers
from letheon.engine.loop import run_method
from letheon.engine.method import Loss, Method, Phase, Run
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import RunFailed
from letheon.loaders.batch import Batch
from tests.world import run_of


@dataclass(frozen=True)
class Annealed(Method):
    """Adds the number of the epoch to the loss, which it holds as Python has it."""

    recipe: Recipe = Recipe(epochs=3, lr=0.01, batch_size=14)

    def phases(self, run: Run, state: object, epoch: int) -> Sequence[Phase]:
        """One pass over the retain set."""

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            zero = net(batch.images).logits.mean() * 0
            return zero + epoch

        return [Phase("anneal", "retain", loss)]


def test_a_loss_that_holds_the_epoch_is_that_of_its_epoch() -> None:
    method, lines = Annealed(), []
    run_method(method, run_of(method), lambda kind, **line: lines.append((kind, line)))
    assert [line["loss"] for kind, line in lines if kind == "phase"] == [0.0, 1.0, 2.0]


def test_compiled_it_is_refused_as_soon_as_it_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("letheon.engine.compiled.BACKEND", "eager")
    method = Annealed()
    run = replace(run_of(method), precision=Precision(compile="default", reduce="flat"))
    with pytest.raises(RunFailed, match=r"phase anneal that holds \(1,\).*run\.epoch"):
        run_method(method, run, lambda kind, **line: None)


def test_what_a_loss_holds() -> None:
    def add(net: nn.Module, batch: Batch, share: float = 0.0) -> Tensor:
        return torch.tensor(share)

    assert held_numbers(partial(add, share=0.5)) == (0.0, 0.5) and held_numbers(add) == (0.0,)
    assert held_numbers(Annealed().phases(None, None, 4)[0].loss) == (4,)  # type: ignore[arg-type]


def test_a_loss_holds_what_its_functions_and_containers_do() -> None:
    def by_keyword(net: nn.Module, batch: Batch, *, epoch: int = 5) -> Tensor:
        return torch.tensor(epoch)

    def nest(epoch: int) -> Loss:
        def call_oneself() -> int:
            return epoch or call_oneself()

        return lambda net, batch: torch.tensor(call_oneself())

    def contain(values: object) -> Loss:
        return lambda net, batch: torch.tensor(values)

    def leave_open() -> tuple[object, ...]:
        def loss(net: nn.Module, batch: Batch) -> Tensor:
            return torch.tensor(late)

        held = held_numbers(loss)
        late = 1
        return held

    assert held_numbers(by_keyword) == (5,)
    assert held_numbers(nest(5)) == (5,)
    assert held_numbers(contain([(5, {"rate": 0.1})])) == (5, "rate", 0.1)
    assert leave_open() == ()
