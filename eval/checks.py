"""Check the numbers that come into a metric: float64 arrays, finite, of the shape expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.engine.distributed import sum_over_ranks
from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.inference.passes import Passes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Numbers = Tensor | NDArray[Any] | Sequence[float] | Sequence[Sequence[float]]


def _host(values: Numbers) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _finite(array: Floats, name: str) -> Floats:
    broken = int(array.size - np.isfinite(array).sum())
    if broken:
        raise RunFailed(
            f"got {broken} of {array.size} values of {name} that are NaN or infinite; "
            "expected finite numbers; the model has diverged or its outputs were cut short"
        )
    return array


def vector(values: Numbers, name: str) -> Floats:
    """(n,) float64 on the host, finite, with n >= 1.

    Raises:
        InputError: another shape; the text names `name`, as do the others.
        NotMeasurable: too few values.
        RunFailed: NaN or infinity.
    """
    array = np.asarray(_host(values), dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"got {name} of shape {array.shape}; expected one row of values")
    if not len(array):
        raise NotMeasurable(f"got 0 {name}; expected at least 1")
    return _finite(array, name)


def matrix(values: Numbers, name: str, rows: int = 1, columns: int = 1) -> Floats:
    """(n, d) float64 on the host, finite, with n >= `rows` and d >= `columns`.

    Raises:
        InputError: another shape; the text names `name`, as do the others.
        NotMeasurable: too few rows.
        RunFailed: NaN or infinity.
    """
    array = np.asarray(_host(values), dtype=np.float64)
    if array.ndim != 2 or array.shape[1] < columns:
        raise InputError(
            f"got {name} of shape {array.shape}; expected a table of at least {columns} columns"
        )
    if len(array) < rows:
        raise NotMeasurable(f"got {len(array)} rows of {name}; expected at least {rows}")
    return _finite(array, name)


def classes(values: Numbers, name: str, n: int | None = None) -> Ints:
    """(n,) int64 class numbers on the host.

    Raises:
        InputError: another shape, numbers that are not whole, or another length than `n`.
    """
    array = _host(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"got {name} of shape {array.shape} and type {array.dtype}; "
            "expected one row of whole class numbers"
        )
    if n is not None and len(array) != n:
        raise InputError(f"got {len(array)} values of {name}; expected {n}, one a sample")
    return array.astype(np.int64)


def check_finite(model: Passes) -> None:
    """Check that outputs are numbers, naming the first layer that gives others.

    Raises:
        InputError: NaN or infinity, on every rank; the text has the layer, the model and the set.
    """
    # Sets with layers first: the others can name no layer but the last two.
    for key, side in sorted(model.outputs.items(), key=lambda item: not item[1].taps):
        layers: Mapping[str, Tensor] = {
            **{f"layer {name}": rows for name, rows in side.taps.items()},
            "the pooled features": side.features,
            "the logits": side.logits,
        }
        for name, rows in layers.items():
            parts = rows.split(8192)
            broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in parts)
            counts = torch.tensor([broken, len(rows)])
            sum_over_ranks([counts], side.ranks)
            if int(counts[0]):
                raise InputError(
                    f"got NaN or infinite values for {counts[0]} of {counts[1]} images in {name} "
                    f"of {model.name} on the {key} set; expected numbers; the model has diverged: "
                    "lower its learning rate"
                )
