"""The retrained reference as a distribution: mean, spread and bootstrap interval over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from letheon.errors import InputError
from letheon.eval.checks import Numbers, vector

Row = Mapping[str, Any]
"""What `build_row` says of one model: metric name -> number, or None where it is not defined."""


@dataclass(frozen=True)
class Band:
    """One metric over the seeds of a reference."""

    mean: float
    std: float | None  # of the seeds, n - 1 in the denominator; None with one seed
    low: float | None  # bootstrap interval of the mean; None with one seed
    high: float | None
    seeds: int


def band(values: Numbers, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Band:
    """Mean, spread and percentile bootstrap interval of the mean (Efron 1979).

    With few seeds the interval is too narrow (three seeds have ten different resamples); `seeds`
    is printed beside it for that reason.

    Args:
        values: (n,) one metric, one value a seed.
        level: share of the resampled means inside the interval.
        draws: resamples.
        seed: of the resampling; the same values and seed give the same interval.

    Raises:
        InputError: no value, or values that are not finite.
    """
    sample = vector(values, "values of the reference")
    if len(sample) == 1:
        return Band(float(sample[0]), None, None, None, 1)
    draw = np.random.default_rng(seed).integers(0, len(sample), (draws, len(sample)))
    means = sample[draw].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Band(
        float(sample.mean()), float(sample.std(ddof=1)), float(low), float(high), len(sample)
    )


@dataclass(frozen=True)
class Reference:
    """The retrained models, metric by metric, over their seeds."""

    bands: dict[str, Band]
    seeds: int

    @property
    def mean(self) -> dict[str, float]:
        """The mean of every metric: what gaps are taken to."""
        return {name: of.mean for name, of in self.bands.items()}

    @property
    def sentence(self) -> str:
        """What can be said of the spread, for a reader."""
        if self.seeds == 1:
            return (
                "The reference is one retrained model: no band can be given, and a gap smaller "
                "than the unknown spread of retraining means nothing."
            )
        return (
            f"The reference is the mean of {self.seeds} retrained models; spreads are standard "
            "deviations over their seeds, intervals are 95 % bootstrap intervals of the mean."
        )


def numbers(row: Row) -> dict[str, float]:
    """Select the metrics of a row: its numbers, not truth values, texts, None and tables."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "seed"
    }


def reference(retrained: Sequence[Row], *, seed: int = 0) -> Reference:
    """Compute the distribution of each metric over the retrained models that have it.

    A retrained model compared with itself (CKA 1) says nothing of the spread: leave such entries
    None.

    Raises:
        InputError: no retrained model, or a metric that is not finite.
    """
    if not retrained:
        raise InputError("got no retrained model; expected at least one to measure gaps to")
    bands = {name: band(of, seed=seed) for name, of in _by_name(retrained).items()}
    return Reference(bands, len(retrained))


def mean_row(rows: Sequence[Row]) -> dict[str, float]:
    """Compute `reference(rows).mean` alone, without the resampling that its intervals need."""
    return {name: float(vector(of, name).mean()) for name, of in _by_name(rows).items()}


def means_without_each(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Compute `mean_row` of all rows but one, for each in turn."""
    tables = [numbers(row) for row in rows]
    means: list[dict[str, float]] = [{} for _ in rows]
    for name, of in _by_name(rows).items():
        values, place = vector(of, name), 0
        whole = float(values.mean())
        for mean, table in zip(means, tables, strict=True):
            if name not in table:
                mean[name] = whole
                continue
            if len(values) > 1:
                mean[name] = float(np.delete(values, place).mean())
            place += 1
    return means


def _by_name(rows: Sequence[Row]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in numbers(row).items():
            values.setdefault(name, []).append(value)
    return values
