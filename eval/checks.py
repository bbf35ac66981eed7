"""Numbers that come into a metric, as checked float64 arrays: finite, of the shape expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Numbers = Tensor | NDArray[Any] | Sequence[float] | Sequence[Sequence[float]]


def _host(values: Numbers) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _finite(array: Floats, name: str) -> Floats:
    broken = int(array.size - np.isfinite(array).sum())
    if broken:
        raise InputError(
            f"got {broken} of {array.size} values of {name} that are NaN or infinite; "
            "expected finite numbers; the model has diverged or its outputs were cut short"
        )
    return array


def vector(values: Numbers, name: str, least: int = 1) -> Floats:
    """(n,) float64 on the host, finite, with n >= `least`.

    Raises:
        InputError: another shape, too few values, NaN or infinity; the text names `name`.
    """
    array = np.asarray(_host(values), dtype=np.float64)
    if array.ndim != 1 or len(array) < least:
        raise InputError(
            f"got {name} of shape {array.shape}; expected one row of at least {least} values"
        )
    return _finite(array, name)


def matrix(values: Numbers, name: str, rows: int = 1, columns: int = 1) -> Floats:
    """(n, d) float64 on the host, finite, with n >= `rows` and d >= `columns`.

    Raises:
        InputError: another shape, NaN or infinity; the text names `name`.
    """
    array = np.asarray(_host(values), dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < rows or array.shape[1] < columns:
        raise InputError(
            f"got {name} of shape {array.shape}; expected a table of at least "
            f"{rows} x {columns} values"
        )
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
