"""Pickles read without running code: containers, text, bytes, numbers and numeric NumPy arrays.

Nothing that a pickle names is looked up: the few names of NumPy's arrays stand for classes of this
file, which take their bytes after checking them, and any other name ends the reading. CIFAR's
Python version (Krizhevsky 2009) is of this kind.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError


def load_restricted(data: bytes, name: str) -> Any:
    """The object in the pickle `data`, text of Python 2 as bytes.

    Raises:
        InputError: It is cut short, or names anything beside what this file admits.
    """
    try:
        return _plain(_Restricted(io.BytesIO(data), encoding="bytes").load())
    except InputError:
        raise
    except Exception as error:  # a broken pickle raises many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name}: got a pickle that is not read ({reason}), expected one of arrays, lists, "
            "dicts, bytes and numbers alone; fetch the file again from where it is published"
        ) from None


class _DType:
    """What stands for `numpy.dtype`: a number's kind and width."""

    def __init__(self, text: Any, *_: Any) -> None:
        self._text = text.decode("ascii") if isinstance(text, bytes) else str(text)
        self._order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self._order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def plain(self) -> np.dtype[Any]:
        dtype = np.dtype(self._text)
        if dtype.kind not in "buif" or self._order not in "<>|=":
            raise pickle.UnpicklingError(f"an array of {self._text!r}")
        return dtype.newbyteorder(">" if self._order == ">" else "<")


class _Array:
    """What stands for `numpy.ndarray`: filled by its state, which is checked."""

    _value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, raw = state
        self._fill(raw, dtype, shape, "F" if by_columns else "C")

    def _fill(self, raw: Any, dtype: Any, shape: Any, order: str) -> None:
        if not isinstance(dtype, _DType) or not isinstance(raw, bytes | bytearray):
            raise pickle.UnpicklingError("an array that is not of numbers")
        kind = dtype.plain()
        shape = tuple(int(side) for side in shape)
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(raw):
            raise pickle.UnpicklingError("an array whose bytes do not fit its shape")
        flat = np.frombuffer(raw, kind)
        self._value = flat.reshape(shape, order="F" if order in ("F", b"F") else "C")

    def plain(self) -> NDArray[Any]:
        if self._value is None:
            raise pickle.UnpicklingError("an array without values")
        return self._value


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array._fill(raw, dtype, shape, order)
    return array


def _scalar(dtype: Any, raw: Any) -> _Array:
    array = _Array()
    array._fill(raw, dtype, (), "C")
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes as Python 3 writes them in the older protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("text in another encoding than latin1")
    return text.encode("latin1")


_ADMITTED: dict[str, Any] = {
    "numpy ndarray": _Array,
    "numpy dtype": _DType,
    "_codecs encode": _encode,
    **{
        f"{core}.{name}": stand_in
        for core in ("numpy.core", "numpy._core")
        for name, stand_in in (
            ("multiarray _reconstruct", _reconstruct),
            ("multiarray scalar", _scalar),
            ("numeric _frombuffer", _from_buffer),
        )
    },
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[f"{module} {name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` with arrays in place of what stands for them; refuses whatever is left over."""
    if depth > 8:
        raise pickle.UnpicklingError("containers in containers")
    if isinstance(value, _Array):
        return value.plain()
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, depth + 1) for item in value)
    if value is None or isinstance(value, bool | int | float | bytes | bytearray | str):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__}")
