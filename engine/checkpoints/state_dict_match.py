"""Match a state dict with an architecture, and fill a model with it strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from letheon.engine.checkpoints.weights_file import few
from letheon.engine.models.classifier import Classifier, build, names
from letheon.errors import InputError

T = TypeVar("T")


class BrokenWeights(InputError):
    """A checkpoint whose weights fit but are not finite."""


def fill_model(model: Classifier, path: Path, state: dict[str, Tensor]) -> None:
    """Copy `state` into the model, strictly; the model is untouched where that fails.

    Raises:
        InputError: keys missing or unexpected, other shapes, or numbers that are not finite.
    """
    expected = model.net.state_dict()
    counters = _counters(expected)
    missing = [key for key in expected if key not in state and key not in counters]
    extra = [key for key in state if key not in expected]
    other = [
        f"{key} {_kind(value)} not {_kind(expected[key])}"
        for key, value in state.items()
        if key in expected and _kind(value) != _kind(expected[key])
    ]
    wrong = [
        f"{len(keys)} {what} ({few(keys)})"
        for keys, what in ((missing, "missing"), (extra, "unexpected"), (other, "differing"))
        if keys
    ]
    if wrong:
        raise InputError(
            f"got {path} with keys {', '.join(wrong)}; expected those of {model.name} with "
            f"{model.classes} classes; {hint(state)}",
            option="model",
        )
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise BrokenWeights(
                f"got {path}; {key} holds NaN or infinity; expected finite weights; "
                "give a checkpoint from before the training diverged"
            )
    model.net.load_state_dict({**counters, **state}, strict=True)


def _counters(expected: Mapping[str, T]) -> dict[str, T]:
    """Find the keys that an old file may lack: the batches each batch-norm has counted."""
    return {k: v for k, v in expected.items() if k.endswith("num_batches_tracked")}


def _kind(value: Tensor) -> str:
    """What must agree: the shape, and numbers of the same nature; half precision is widened."""
    nature = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{nature}"


def hint(state: dict[str, Tensor]) -> str:
    """Say how to mend a wrong or missing architecture: the names that fit keys and shapes."""
    fitting = [name for name in names() if _fits(name, state)]
    if fitting:
        return f"its keys fit model {' or '.join(fitting)}"
    return f"give its model; known are {', '.join(names())}"


def _fits(name: str, state: Mapping[str, Tensor]) -> bool:
    """Compare keys and shapes, whatever the number of classes."""
    empty = skeleton(name)
    head = {f"{empty.head_path}.weight", f"{empty.head_path}.bias"}
    expected, actual = (
        {k: _kind(v[:1] if k in head and v.dim() else v) for k, v in tensors.items()}
        for tensors in (empty.net.state_dict(), state)
    )
    return {**_counters(expected), **actual} == expected


def class_count(state: dict[str, Tensor], name: str) -> int | None:
    """Count the rows of the last layer's weight; None where `state` has no such key."""
    weight = state.get(skeleton(name).head_path + ".weight")
    return len(weight) if weight is not None and weight.dim() else None


def skeleton(name: str) -> Classifier:
    """Build the architecture, of two classes, without memory for its weights."""
    with torch.device("meta"):
        return build(name, 2)
