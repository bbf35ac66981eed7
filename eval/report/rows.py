"""Prepare the rows of a report: check them, add scores against the reference, list the columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from letheon.errors import InputError, suggest
from letheon.eval.metrics.reference import (
    Reference,
    mean_row,
    means_without_each,
    numbers,
    reference,
)
from letheon.eval.metrics.registry import Summary, groups
from letheon.eval.metrics.scores import scores
from letheon.eval.report.definitions import define, order, summary_columns

ROLES = ("original", "retrained", "control", "unlearned")
"""In the order of the tables. Controls: a random network, FT, head distillation."""


@dataclass(frozen=True)
class Prepared:
    """What every format of the report is written from."""

    rows: list[dict[str, Any]]  # plain values only, scores added, ordered by role
    reference: Reference | None
    columns: dict[str, list[str]]  # group -> metrics that some row has, in the reports' order
    left_out: dict[str, str] = field(default_factory=dict)  # model -> why it has no row

    def of_role(self, *roles: str) -> list[dict[str, Any]]:
        """Select the rows of these roles, in order."""
        return [row for row in self.rows if row["role"] in roles]

    @property
    def summary(self) -> list[tuple[str, Summary]]:
        """(key, column) of the short table; those that no row has are absent."""
        return [
            (key, column)
            for key, column in summary_columns()
            if any(row.get(key) is not None for row in self.rows)
        ]

    @property
    def sentence(self) -> str:
        """What stands above every table: about the reference, and who was left out."""
        first = (
            self.reference.sentence
            if self.reference
            else "No retrained model is there: gaps to it and the scores made of them are absent."
        )
        return " ".join([first, *(f"Left out: {n}: {why}." for n, why in self.left_out.items())])


def _plain(value: Any, where: str) -> Any:
    """Convert to what JSON knows; arrays and tensors become lists.

    Raises:
        InputError: any other type, or a number that is NaN or infinite; the text says where.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        items = ((_printable(str(key)), item) for key, item in value.items())
        return {key: _plain(item, f"{where}.{key}") for key, item in items}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"got {value} at {where}; expected a finite number, or None and a reason")
    if isinstance(value, str):
        return _printable(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InputError(f"got {type(value).__name__} at {where}; expected numbers, texts or tables")


def _printable(text: str) -> str:
    """Show bytes of a file name that are no UTF-8, such as a folder's in Latin-1, as U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _check(row: Mapping[str, Any], place: int) -> dict[str, Any]:
    name, role = row.get("name"), row.get("role", "unlearned")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f'got row {place} without a name; expected "name": what to call the model')
    if role not in ROLES:
        raise InputError(
            f"got role {role!r} of {name}; expected one of {', '.join(ROLES)}"
            f"{suggest(str(role), ROLES)}"
        )
    plain: dict[str, Any] = _plain({**row, "role": role}, name)
    for key, value in numbers(plain).items():
        if define(key).unit == "share" and not -1e-9 <= value <= 1 + 1e-9:
            raise InputError(
                f"got {key} = {value} of {name}; expected a share from 0 to 1, not per cent"
            )
    return plain


def prepare(
    rows: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, str] | None = None,
    known: Reference | None = None,
) -> Prepared:
    """Check the rows, order them by role and add the scores that can be had.

    A retrained model is scored against the mean of the others: the spread that no method can beat.

    Args:
        rows: one a model.
        left_out: models without a row, and why.
        known: the retrained models' bands, where they were computed before.

    Raises:
        InputError: no row, a row without a name, a name twice, an unknown role, a value that is
            not finite or not a share.
    """
    checked = [_check(row, place) for place, row in enumerate(rows)]
    names = Counter(row["name"] for row in checked)
    twice = sorted(name for name, count in names.items() if count > 1)
    if not checked or twice:
        got = f"several rows named {', '.join(twice)}" if twice else "no rows"
        raise InputError(f"got {got}; expected one row a model, each with its own name")
    checked.sort(key=lambda row: ROLES.index(row["role"]))  # stable within a role
    originals = [row for row in checked if row["role"] == "original"]
    retrained = [row for row in checked if row["role"] == "retrained"]
    original = originals[0] if originals else None
    of_all = mean_row(retrained)
    of_others = zip((row["name"] for row in retrained), means_without_each(retrained), strict=True)
    means = dict(of_others)
    scored = {
        row["name"]: scores(row, original, means.get(row["name"], of_all) or None)
        for row in checked
    }
    for row in checked:
        new = scored[row["name"]].items()
        row |= {key: value for key, value in new if row.get(key) is None}
    of = (known or reference(retrained)) if retrained else None
    present = order({key for row in checked for key in numbers(row)})
    columns = {group: [key for key in present if define(key).group == group] for group in groups()}
    columns = {group: keys for group, keys in columns.items() if keys}
    return Prepared(checked, of, columns, dict(left_out or {}))
