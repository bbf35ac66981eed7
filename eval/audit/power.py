"""Power: the share of planted leaks that each number finds, beside its false-positive rate.

A leak of known size is a model retrained without the forget set but for a share of it: it knows
these images and no others. A metric finds it where it accuses the model by the very rule that
gives its false-positive rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from letheon.eval.audit.false_positives import LEVEL, accusers, deviations, false_positives
from letheon.eval.metrics.reference import Row
from letheon.eval.report.definitions import define
from letheon.eval.report.verdict import p_value


@dataclass(frozen=True)
class Power:
    """How often one number accuses retrained models, and leaks of each size."""

    title: str
    false_positives: float  # share of the retrained models
    rates: dict[str, float]  # size -> share of the leaks


def measure_power(rows: Sequence[Row], sizes: Mapping[str, Sequence[str]]) -> list[Power]:
    """Measure the power of every number, of the verdict and of the canaries, the strongest first.

    Args:
        rows: of a table with retrained models, each with "name" and "role".
        sizes: size of a leak -> names of the models that have it, the smallest first.
    """
    by_name = {row["name"]: row for row in rows}
    retrained = [row for row in rows if row["role"] == "retrained"]
    leaks = {size: [by_name[name] for name in names] for size, names in sizes.items()}
    accused = {
        size: [accusers(deviations(row, retrained)) for row in models]
        for size, models in leaks.items()
    }
    result = []
    for key, each in false_positives(rows).items():
        rates = {size: fmean(key in keys for keys in of) for size, of in accused.items()}
        result.append(Power(define(key).title, each.rate, rates))

    def is_flagged(row: Row) -> bool:
        others = [other for other in retrained if other is not row]
        return p_value(row, others) <= LEVEL

    def is_recalled(row: Row) -> bool:
        return bool(row["canary_p"] <= LEVEL)

    tests = {"**verdict: one of the retrained?**": is_flagged}
    everyone = [*retrained, *(row for models in leaks.values() for row in models)]
    if all(row.get("canary_p") is not None for row in everyone):
        tests["**canaries, p of the rank (reads no retrained model)**"] = is_recalled
    for title, test in tests.items():
        rates = {size: fmean(map(test, models)) for size, models in leaks.items()}
        result.append(Power(title, fmean(map(test, retrained)), rates))
    return sorted(result, key=lambda one: (*(-rate for rate in one.rates.values()), one.title))


def as_table(powers: Sequence[Power]) -> str:
    """Write a Markdown table: a line a number, a column a size of leak."""
    sizes = list(powers[0].rates)
    lines = [
        f"| number | false positives | {' | '.join(f'leak {size}' for size in sizes)} |",
        f"|---|---:|{'---:|' * len(sizes)}",
    ]
    for one in powers:
        cells = " | ".join(f"{rate:.0%}" for rate in one.rates.values())
        lines.append(f"| {one.title} | {one.false_positives:.0%} | {cells} |")
    return "\n".join(lines) + "\n"
