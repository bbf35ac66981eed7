"""False-positive rates: each retrained model audited as if it were unlearned, against the others.

A retrained model's row compares it with the other retrained models alone (`Case.others`), so that
its numbers are already those of a leave-one-out audit. Those that compare with one retrained model
(CKA, the gap) take the first, which has none itself: they are of the others, all against that one.
What is added here is the rule by which a
number accuses a model, and how often it accuses one that never saw the forget set. Everything is
read from rows, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import inf, sqrt
from typing import Any

import numpy as np

from letheon.eval.checks import Floats
from letheon.eval.metrics.reference import Row, numbers
from letheon.eval.metrics.registry import metrics

LEVEL = 0.05
"""Rate at which a retrained model may be accused."""
LEAST = 3
"""Retrained models below which no spread is taken: two others have to be there."""


@dataclass(frozen=True)
class FalsePositives:
    """How often one metric accuses a retrained model."""

    key: str
    seeds: int
    mean: float
    std: float  # n - 1 in the denominator
    flagged: tuple[str, ...]  # names of the retrained models that it accuses

    @property
    def rate(self) -> float:
        """Share of the retrained models that are accused."""
        return len(self.flagged) / self.seeds

    @property
    def bound(self) -> float:
        """Upper end of the exact 95 % interval of the rate (Clopper and Pearson 1934)."""
        return exact_interval(len(self.flagged), self.seeds)[1]


def exact_interval(hits: int, count: int) -> tuple[float, float]:
    """Compute the exact 95 % interval of a rate of `hits` in `count` (Clopper and Pearson 1934)."""
    from scipy.stats import beta  # slow to import

    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, count - hits + 1))
    high = 1.0 if hits == count else float(beta.ppf(0.975, hits + 1, count - hits))
    return low, high


def audited_keys() -> list[str]:
    """List the keys of all numbers that say something of a model, costs and tables aside."""
    of = [m for m in metrics().values() if m.group != "Cost" and m.unit != "table"]
    return [key for metric in of for key in metric.keys]


@cache
def tolerance(seeds: int, level: float = LEVEL) -> float:
    """Return the distance, in standard deviations of n models, beyond which one more is accused.

    The prediction interval of a normal sample (Student's t): t(1 - level / 2, n - 1) sqrt(1 + 1/n).
    Two standard deviations accuse 12 % of the retrained models where there are 5 others.
    """
    from scipy.stats import t  # slow to import

    return float(t.ppf(1 - level / 2, seeds - 1)) * sqrt(1 + 1 / seeds)


def deviation(value: float, others: Floats) -> float:
    """Return (value - mean) / standard deviation of at least two others; +-inf where they agree.

    Others that agree to rounding and a value that agrees with them give 0.
    """
    away, spread = value - float(others.mean()), float(others.std(ddof=1))
    if abs(away) <= 1e-9 * max(1.0, abs(value)):
        return 0.0
    if spread <= 1e-12 * max(1.0, abs(value)):
        return inf if away > 0 else -inf
    return away / spread


def deviations(row: Row, retrained: Sequence[Row]) -> dict[str, tuple[float, int]]:
    """Return every number of a row in units of the others' spread, and how many others have it.

    Args:
        row: of any model; where it is one of `retrained` (by name), it is left out of them.
        retrained: rows of the retrained models.

    Returns:
        Key -> (`deviation`, others); numbers that fewer than two others have are absent.
    """
    own, found = numbers(row), {}
    others = [numbers(other) for other in retrained if other["name"] != row["name"]]
    for key in audited_keys():
        values = np.array([other[key] for other in others if key in other])
        if key in own and len(values) >= LEAST - 1:
            found[key] = (deviation(own[key], values), len(values))
    return found


def accusers(away: Mapping[str, tuple[float, int]]) -> list[str]:
    """List the metrics whose `deviations` are beyond the tolerance."""
    return [key for key, (value, others) in away.items() if abs(value) > tolerance(others)]


def false_positives(rows: Sequence[Row]) -> dict[str, FalsePositives]:
    """Measure how often each metric accuses a retrained model; {} below `LEAST` of them.

    Args:
        rows: of a table, each with "name" and "role".
    """
    retrained = [row for row in rows if row["role"] == "retrained"]
    if len(retrained) < LEAST:
        return {}
    accused = {row["name"]: accusers(deviations(row, retrained)) for row in retrained}
    tables, found = [numbers(row) for row in retrained], {}
    for key in audited_keys():
        values = np.array([table[key] for table in tables if key in table])
        if len(values) >= LEAST:
            names = tuple(name for name, keys in accused.items() if key in keys)
            spread = float(values.std(ddof=1))
            found[key] = FalsePositives(key, len(values), float(values.mean()), spread, names)
    return found


def any_rate(rates: dict[str, FalsePositives], retrained: int) -> float:
    """Return the share of the retrained models that at least one metric accuses."""
    return len({name for each in rates.values() for name in each.flagged}) / retrained


def as_facts(rates: dict[str, FalsePositives]) -> Iterator[dict[str, Any]]:
    """Yield what JSON holds of each metric."""
    for each in rates.values():
        yield {**asdict(each), "rate": each.rate, "bound": each.bound}
