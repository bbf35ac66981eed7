"""Disagreement of the metrics: Kendall's tau between the orders in which they rank the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from letheon.eval.checks import Floats
from letheon.eval.metrics.reference import Row, mean_row, numbers
from letheon.eval.metrics.registry import Better, Metric, metrics

LEAST = 4
"""Models below which an order says nothing."""
OPPOSED = 5
"""Pairs of metrics that are named."""
_IDEALS: dict[Better, float] = {"50 %": 0.5, "0": 0.0, "1": 1.0}


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b between every two metrics over the models that were to forget."""

    keys: tuple[str, ...]
    models: int
    taus: Floats  # (keys, keys), 1 on the diagonal

    @property
    def mean(self) -> float:
        """Mean over the pairs of metrics; 1 if all rank alike, about 0 for unrelated orders."""
        rows, columns = np.triu_indices(len(self.keys), 1)
        return float(self.taus[rows, columns].mean())

    def worst_pairs(self) -> list[tuple[str, str, float]]:
        """List the pairs of metrics that disagree most, the worst first."""
        pairs = [
            (a, b, float(self.taus[i, j]))
            for (i, a), (j, b) in combinations(enumerate(self.keys), 2)
        ]
        return sorted(pairs, key=lambda pair: pair[2])[:OPPOSED]

    @property
    def sentence(self) -> str:
        """What a reader is told beside any score."""
        few = "; fewer than 6 models rank alike by chance" if self.models < 6 else ""
        return (
            f"{len(self.keys)} metrics rank the {self.models} models with a mean Kendall tau of "
            f"{self.mean:.2f} (1: all agree; 0: unrelated{few})"
        )


def _badness(metric: Metric, value: float, mean: float | None) -> float | None:
    """Distance to the metric's ideal, smaller is better; None where it has none."""
    if metric.better == "as retrained":
        return None if mean is None else abs(value - mean)
    if metric.better in ("high", "low"):
        return value if metric.better == "low" else -value
    return abs(value - _IDEALS[metric.better]) if metric.better in _IDEALS else None


def agreement(rows: Sequence[Row]) -> Agreement | None:
    """Rank the unlearned models and controls by each metric's ideal, and compare the orders.

    Metrics that not every model has, that have no ideal, or that are equal for all are left out,
    and UA, which is FA again. None with fewer than `LEAST` models or two metrics.

    Args:
        rows: of a table, each with "name" and "role".
    """
    retrained = [row for row in rows if row["role"] == "retrained"]
    means = mean_row(retrained)
    tables = [numbers(row) for row in rows if row["role"] in ("unlearned", "control")]
    if len(tables) < LEAST:
        return None
    ranks: dict[str, list[float]] = {}
    for key, metric in metrics().items():
        if metric.group == "Cost" or key == "UA" or any(key not in table for table in tables):
            continue
        worth = [_badness(metric, table[key], means.get(key)) for table in tables]
        known = [value for value in worth if value is not None]
        if len(known) == len(tables) and len(set(known)) > 1:
            ranks[key] = known
    if len(ranks) < 2:
        return None
    from scipy.stats import kendalltau  # slow to import

    keys = tuple(ranks)
    taus = np.eye(len(keys))
    for (i, a), (j, b) in combinations(enumerate(keys), 2):
        taus[i, j] = taus[j, i] = kendalltau(ranks[a], ranks[b]).statistic
    return Agreement(keys, len(tables), taus)
