"""Refuse a value of another type than its setting's, or none of a closed set's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from letheon.errors import InputError, suggest


def check_choices(settings: Any) -> None:
    """Check the fields of a dataclass, and of those inside it: closed sets and plain types.

    The command line's parser knows them; from Python nothing else looks at them.

    Raises:
        InputError: a value that is none of the field's; `option` is the field.
    """
    known, kinds = _choices(settings.__class__), field_types(settings.__class__)
    for field in fields(settings):
        value = getattr(settings, field.name)
        check_type(value, kinds.get(field.name, Any), field.name)
        if is_dataclass(value) and not isinstance(value, type):
            check_choices(value)
        for one in value if isinstance(value, tuple | list) else (value,):
            if known.get(field.name) and one not in known[field.name]:
                raise refuse_choice(one, known[field.name], field.name)


def check_type(value: Any, kind: Any, option: str) -> None:
    """Check a value against a plain type: a number, truth value, text or dataclass, or None.

    A whole number will do for any number; other types are not looked at.

    Raises:
        InputError: it is of another type.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if not any(_is_of(value, one) for one in kinds):
        names = ("None" if one is type(None) else getattr(one, "__name__", one) for one in kinds)
        raise InputError(
            f"got {option.replace('_', ' ')} {value!r}; expected {' or '.join(map(str, names))}",
            option,
        )


def _is_of(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind in (bool, str, type(None)) or (isinstance(kind, type) and is_dataclass(kind)):
        return isinstance(value, kind)
    return True


def refuse_choice(value: Any, known: Iterable[Any], option: str = "") -> InputError:
    """Make the error of a value that is none of the known ones."""
    names = list(map(str, known))
    what = f"{option.replace('_', ' ')} {value!r}".strip()
    return InputError(
        f"got {what}; expected one of {', '.join(names)}{suggest(str(value), names)}", option
    )


@cache
def _choices(settings: Any) -> dict[str, tuple[Any, ...]]:
    """Each field's closed set; None is of it where the field may be None."""
    return {name: tuple(_values(kind)) for name, kind in field_types(settings).items()}


@cache
def field_types(settings: Any) -> dict[str, Any]:
    """Each field's type; none of a class made in a function, whose names no one else knows."""
    try:
        hints = get_type_hints(settings)
    except NameError:
        return {}
    return {field.name: hints[field.name] for field in fields(settings)}


def _values(kind: Any) -> Iterator[Any]:
    """The values of a type made of Literals alone, or of tuples of them; none of others."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        yield from parts
    elif get_origin(kind) is tuple and parts[-1] is ...:
        yield from _values(parts[0])
    elif get_origin(kind) in (Union, UnionType) and all(
        get_origin(part) is Literal or part is type(None) for part in parts
    ):
        for part in parts:
            yield from (None,) if part is type(None) else get_args(part)
