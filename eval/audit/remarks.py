"""How often each remark of the verdict is said of a model that never saw the forget set.

Each retrained model is judged as if it had unlearned, with itself left out of the retrained ones,
and its line is the one that a report would print. Everything is read from rows, in a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from letheon.eval.audit.false_positives import LEVEL, exact_interval
from letheon.eval.metrics.reference import Row
from letheon.eval.report.verdict import ORACLES, judge_one

REMARKS = {
    "is not one of": "is not one of the retrained models",
    "closer to the original model": "closer to the original model",
    "moves the answers to the forget images, too": "no side: it lost what was to be kept",
    "but as near or nearer are": "no side: as near as models of the other side",
    "times as far from them": "but its answers lie N times as far",
    "features are more like the original's": "but its features are more like the original's",
    "it still names": "but it still names held-out images of the forgotten classes",
    "with one learned offset": "but with one learned offset it names forget images",
    "with weights of 4 bits": "but with weights of 4 bits it names forget images",
    "as it learns from retain images": "but as it learns from retain images it names forget images",
}
"""Words of a verdict's line that speak against a model -> what is said."""


@dataclass(frozen=True)
class Frequency:
    """How often one remark is said of a retrained model."""

    remark: str
    models: tuple[str, ...]  # names of the retrained models of which it is said
    judged: int

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval of the rate (Clopper and Pearson 1934)."""
        return exact_interval(len(self.models), self.judged)


def count_remarks(rows: Sequence[Row]) -> list[Frequency]:
    """Judge each retrained model against the others, and count each of `REMARKS`, then any of them.

    Args:
        rows: of a table, each with "name" and "role".

    Returns:
        Nothing without an original, or with too few retrained models for a p-value of each.
    """
    retrained = [row for row in rows if row["role"] == "retrained"]
    if len(retrained) <= ORACLES or not any(row["role"] == "original" for row in rows):
        return []
    lines: dict[str, str] = {}
    for row in retrained:
        judged = {**row, "role": "unlearned"}
        lines[str(row["name"])] = judge_one(judged, [r if r is not row else judged for r in rows])
    found = [
        Frequency(title, tuple(name for name, line in lines.items() if words in line), len(lines))
        for words, title in REMARKS.items()
    ]
    every = {name for each in found for name in each.models}
    return [*found, Frequency("any of them", tuple(n for n in lines if n in every), len(lines))]


def list_remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table of the remarks; none where nothing can be counted."""
    said = count_remarks(rows)
    if not said:
        return
    yield "| said of a retrained model | times | rate | 95 % interval |"
    yield "|---|---:|---:|---:|"
    for each in said:
        low, high = each.interval
        rate = len(each.models) / each.judged
        mark = "**" if rate > LEVEL else ""
        yield (
            f"| {each.remark} | {len(each.models)} of {each.judged} | {mark}{rate:.1%}{mark} "
            f"| {low:.1%} to {high:.1%} |"
        )


def remark_facts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what JSON holds of each remark."""
    return [{**asdict(each), "interval": each.interval} for each in count_remarks(rows)]
