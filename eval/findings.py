"""Metrics as they are found, and the reason for each that could not be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from letheon.loaders.errors import InputError

T = TypeVar("T")


@dataclass
class Findings:
    """Part of a model's row."""

    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)  # metric -> why it is None

    def add(self, keys: tuple[str, ...], compute: Callable[[], Mapping[str, Any]]) -> None:
        """Enter what `compute` returns under its keys; where it finds an ingredient missing, why.

        Args:
            keys: what `compute` would return.
            compute: raises InputError where it cannot.
        """
        try:
            found = compute()
        except InputError as error:
            self.values |= dict.fromkeys(keys)
            self.why |= dict.fromkeys(keys, str(error))
            return
        assert set(found) == set(keys), f"{sorted(found)} is not {sorted(keys)}"
        self.values |= found


def needed(value: T | None, reason: str) -> T:
    """The value; an InputError with the reason where there is none."""
    if value is None:
        raise InputError(reason)
    return value
