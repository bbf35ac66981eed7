"""Metrics as they are found, and the reason for each that could not be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from letheon.engine.distributed import Ranks, gather_objects
from letheon.errors import InputError

T = TypeVar("T")


@dataclass
class Findings:
    """Part of a model's row; over several ranks each computes its share, `share` joins them."""

    ranks: Ranks = field(default_factory=Ranks)
    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)  # metric -> why it is None
    _asked: list[tuple[str, ...]] = field(default_factory=list)  # keys of every `add` so far

    def add(self, keys: tuple[str, ...], compute: Callable[[], Mapping[str, Any]]) -> None:
        """Enter what `compute` returns under its keys; where it finds an ingredient missing, why.

        Args:
            keys: what `compute` would return.
            compute: raises InputError where it cannot; runs on one rank, so it must not wait for
                the others.
        """
        turn = len(self._asked) % self.ranks.world
        self._asked.append(keys)
        if turn != self.ranks.rank:
            return
        try:
            found = compute()
        except InputError as error:
            self.values |= dict.fromkeys(keys)
            self.why |= dict.fromkeys(keys, str(error))
            return
        assert set(found) == set(keys), f"{sorted(found)} is not {sorted(keys)}"
        self.values |= found

    def share(self) -> None:
        """Have what the other ranks found too; every rank must call, after its last `add`."""
        values: dict[str, Any] = {}
        for theirs, why in gather_objects((self.values, self.why), self.ranks):
            values |= theirs
            self.why |= why
        self.values = {key: values[key] for keys in self._asked for key in keys}


def needed(value: T | None, reason: str) -> T:
    """The value; an InputError with the reason where there is none."""
    if value is None:
        raise InputError(reason)
    return value
