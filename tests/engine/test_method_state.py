"""A method's state: what it may hold, and that it comes back as it was saved."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from letheon.engine.checkpoints.method_state import State, load_state_dict, rebuilt, state_dict
from letheon.engine.method import Run
from letheon.errors import RunFailed
from letheon.methods import METHODS, inner_fields
from letheon.methods.finetune import Finetune
from letheon.methods.random_label import RandomLabel
from tests.world import run_of, trained


@dataclass
class Inner(State):
    mask: list[Tensor]
    start: dict[str, Tensor]


@dataclass
class Everything(State):
    number: float
    text: str | None
    tensor: Tensor
    many: list[Tensor]
    table: dict[str, Tensor]
    inner: State = field(default_factory=State)
    other: object = rebuilt(default=None)


def everything(value: float) -> Everything:
    inner = Inner([torch.full((2,), value)], {"a": torch.full((1,), value)})
    return Everything(
        value, str(value), torch.full((2, 2), value), [torch.full((3,), value)] * 1,
        {"x.y": torch.full((1,), value)}, inner, object(),
    )  # fmt: skip


def test_a_state_comes_back_as_it_was_saved() -> None:
    tensors, values = state_dict(everything(1.5))
    assert sorted(tensors) == ["inner.mask.0", "inner.start.a", "many.0", "table.x.y", "tensor"]
    assert values == {"number": 1.5, "text": "1.5"}
    other = everything(0.0)
    place, kept = other.tensor.data_ptr(), other.other
    load_state_dict(other, {k: v.clone() for k, v in tensors.items()}, values)
    again, numbers = state_dict(other)
    assert numbers == values and all(torch.equal(again[k], tensors[k]) for k in tensors)
    assert other.tensor.data_ptr() == place and other.other is kept
    with pytest.raises(RunFailed, match="differs in the tensor many.0"):
        load_state_dict(other, {k: v for k, v in tensors.items() if k != "many.0"}, values)
    with pytest.raises(RunFailed, match=r"saved tensor of torch.float32 \(2,\)"):
        load_state_dict(other, tensors | {"tensor": torch.zeros(2)}, values)


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_state_can_be_saved(name: str) -> None:
    kind = METHODS[name]
    inner = {field: RandomLabel(order="sequential") for field in inner_fields(kind)}
    method = kind(**inner)
    tensors, values = state_dict(method.prepare(run_of(method)))
    assert all(isinstance(value, Tensor) for value in tensors.values())
    assert all(isinstance(value, int | float | str | None) for value in values.values())


@dataclass
class Opaque(State):
    thing: object


class KeepsAThing(Finetune):
    def prepare(self, run: Run) -> State:
        return Opaque(object())


def test_what_cannot_be_saved_is_refused_before_the_first_step() -> None:
    with pytest.raises(RunFailed, match="the state's thing"):
        trained(KeepsAThing())
