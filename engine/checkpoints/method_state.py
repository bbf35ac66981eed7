"""What a method keeps between its events: one typed dataclass, private to it, that can be saved.

@dataclass
class SalunState(State):
masks: dict[str, Tensor]            # saved and restored
inner: State                        # saved and restored, apart from ours
teacher: Classifier = rebuilt()     # not saved: `prepare` makes it again
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from letheon.errors import RunFailed

_REBUILT = "letheon.rebuilt"


@dataclass
class State:
    """Base class of the states of methods; alone it is the state of a method that keeps nothing.

    Fields are tensors, numbers, texts, None, other states, and lists, tuples and dicts (with text
    keys) of these; whatever else it needs is declared with `rebuilt`. Equal on every rank, unless a
    method says otherwise.
    """


def rebuilt(**options: Any) -> Any:
    """A dataclass field that no checkpoint holds: `prepare` builds it again from the start weights.

    `options` are those of `dataclasses.field`.
    """
    return field(metadata={_REBUILT: True}, **options)


def state_dict(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The contents of a state by the path of their field, such as ``inner.masks.0``.

    Returns:
        tensors: as they are, not copied.
        values: numbers, texts and None, ready for JSON.

    Raises:
        RunFailed: a field can be neither saved nor is declared `rebuilt`.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for path, value in _leaves(state, ""):
        if isinstance(value, Tensor):
            tensors[path] = value
        else:
            values[path] = value
    return tensors, values


def load_state_dict(state: State, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Fill a state that `prepare` has just built with saved contents, in place.

    Tensors are copied into those that are there, so they keep their device and memory layout.

    Raises:
        RunFailed: a path is missing, too many, or of another shape or dtype.
    """
    own, plain = state_dict(state)
    for kind, here, saved in (("tensor", own, tensors), ("value", plain, values)):
        if odd := sorted(set(here) ^ set(saved)):
            raise RunFailed(
                f"got a saved state that differs in the {kind} {odd[0]} ({len(odd)} such); "
                "expected the fields of this method; resume with the version that saved it"
            )
    for path, tensor in own.items():
        other = tensors[path]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise RunFailed(
                f"got a saved {path} of {other.dtype} {tuple(other.shape)}; expected "
                f"{tensor.dtype} {tuple(tensor.shape)}; resume with the version that saved it"
            )
        tensor.copy_(other)
    _set_values(state, "", values)


def _fields(state: State) -> Iterator[dataclasses.Field[Any]]:
    return (f for f in dataclasses.fields(state) if not f.metadata.get(_REBUILT))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    before = f"{path}." if path else ""
    if isinstance(value, State):
        for item in _fields(value):
            yield from _leaves(getattr(value, item.name), before + item.name)
    elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        for key, one in value.items():
            yield from _leaves(one, before + key)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for number, one in enumerate(value):
            yield from _leaves(one, f"{before}{number}")
    elif value is None or isinstance(value, Tensor | bool | int | float | str):
        yield path, value
    else:
        raise RunFailed(
            f"got a {type(value).__name__} in the state's {path}; expected tensors, numbers, texts "
            "or states; declare the field with letheon.engine.checkpoints.method_state.rebuilt()"
        )


def _set_values(value: Any, path: str, values: Mapping[str, Any]) -> Any:
    """The same with the numbers and texts of `values`; states, lists and dicts change in place."""
    before = f"{path}." if path else ""
    if isinstance(value, State):
        for item in _fields(value):
            new = _set_values(getattr(value, item.name), before + item.name, values)
            object.__setattr__(value, item.name, new)
    elif isinstance(value, dict):
        for key, one in value.items():
            value[key] = _set_values(one, before + key, values)
    elif isinstance(value, list | tuple):
        items = [_set_values(one, f"{before}{k}", values) for k, one in enumerate(value)]
        named = hasattr(value, "_fields")  # a NamedTuple
        return type(value)(*items) if named else type(value)(items)
    elif not isinstance(value, Tensor):
        return values[path]
    return value
