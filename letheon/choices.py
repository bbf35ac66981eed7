"""Refuse a value that is none of a closed set's, with the nearest one that is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from letheon.errors import InputError, suggest


def check_choices(settings: Any) -> None:
    """Check the fields of a dataclass, and of those inside it, that are annotated `Literal`.

    The command line's parser knows them; from Python nothing else looks at them.

    Raises:
        InputError: a value that is none of the field's; `option` is the field.
    """
    known = _choices(settings.__class__)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            check_choices(value)
        for one in value if isinstance(value, tuple | list) else (value,):
            if known.get(field.name) and one not in known[field.name]:
                raise refuse_choice(one, known[field.name], field.name)


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
    try:
        hints = get_type_hints(settings)
    except NameError:  # a class made in a function, whose names no one else knows
        return {}
    return {field.name: tuple(_values(hints[field.name])) for field in fields(settings)}


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
