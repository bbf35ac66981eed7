"""The settings that a search tries: their ranges, and a method with other values of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from letheon.engine.method import Method
from letheon.engine.recipe import Recipe
from letheon.errors import InputError, suggest

LR_FACTOR = 30.0
"""The rate is searched from its setting divided by this to its setting times this."""


@dataclass(frozen=True)
class Range:
    """Where the values of one setting are looked for."""

    name: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    choices: tuple[str, ...] = ()
    """Words in place of numbers."""

    @property
    def log(self) -> bool:
        """Whether numbers are drawn by their logarithm: a range over a factor of ten or more."""
        return not self.choices and self.low > 0 and self.high >= 10 * self.low

    def suggest(self, trial: Any) -> Any:
        """Ask an Optuna trial for a value."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the range."""
        return value in self.choices if self.choices else self.low <= value <= self.high


def choose_ranges(text: str, method: Method) -> list[Range]:
    """Read the ranges of a search; without any, the rate and what the method itself declares.

    Args:
        text: such as ``lr=1e-4:0.1,epochs=1:10,order=mixed|paired``.
        method: whose settings they are; those of its recipe and of a method inside it, too.

    Raises:
        InputError: no such setting, not two numbers in order, or nothing to search.
    """
    ranges = [_read(part, method) for part in text.split(",")] if text else [*_own_ranges(method)]
    names = [one.name for one in ranges]
    if not ranges or len(set(names)) < len(names):
        raise InputError(
            f"got {text or 'no ranges'} for {method.name}, which declares none of its own; "
            "expected each setting once; such as lr=1e-4:0.1",
            option="ranges",
        )
    return ranges


def _own_ranges(method: Method) -> Iterator[Range]:
    found: dict[str, Range] = {}
    for holder in _holders(method):
        if isinstance(holder, Recipe):
            if holder.epochs and holder.lr:
                found["lr"] = Range("lr", holder.lr / LR_FACTOR, holder.lr * LR_FACTOR)
        else:
            found |= {name: Range(name, *ends) for name, ends in holder.ranges.items()}
    yield from found.values()


def _read(part: str, method: Method) -> Range:
    name, _, ends = part.strip().partition("=")
    name = name.strip().replace("-", "_")
    known = current_settings(method)
    if name not in known:
        raise InputError(
            f"got a range of {name!r}; expected one of {method.name}'s settings: "
            f"{', '.join(known)}{suggest(name, known)}",
            option="ranges",
        )
    if "|" in ends:
        return Range(name, choices=tuple(word.strip() for word in ends.split("|")))
    try:
        low, high = (float(end) for end in ends.split(":"))
    except ValueError:
        low, high = math.nan, math.nan
    whole = isinstance(known[name], int) and not isinstance(known[name], bool)
    if not low < high < math.inf or (whole and (low % 1 or high % 1)):
        kind = "whole numbers" if whole else "numbers"
        raise InputError(
            f"got the range {part.strip()!r}; expected two {kind}, the lower first, such as "
            f"{name}=1:10; or words, such as {name}=a|b",
            option="ranges",
        )
    return Range(name, low, high, whole)


def _holders(method: Method) -> Iterator[Method | Recipe]:
    """The method, its recipe, and the same of the methods inside it."""
    yield method
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if isinstance(value, Method):
            yield from _holders(value)
        elif isinstance(value, Recipe):
            yield value


def current_settings(method: Method) -> dict[str, Any]:
    """Every setting by name: the method's, its recipe's and those of a method inside it."""
    return {
        field.name: value
        for holder in _holders(method)
        for field in dataclasses.fields(holder)  # type: ignore[arg-type]
        if not isinstance(value := getattr(holder, field.name), Method | Recipe)
    }


def replace_settings(method: Any, values: Mapping[str, Any]) -> Any:
    """Copy a method with other values of some settings, wherever in it they are.

    Raises:
        InputError: the method refuses a value.
    """
    changes = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Method | Recipe):
            changes[field.name] = replace_settings(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(method, **changes)
