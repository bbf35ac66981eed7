"""Tables of the strata: each model's accuracy on parts of the forget set, beside the retrained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isinf

import numpy as np

from letheon.eval.audit.false_positives import LEAST, deviation, tolerance
from letheon.eval.metrics.reference import Row

SHOWN = 10
"""Strata of a kind that are shown, those of the most images."""


def _cell(row: Row, kind: str, name: str, retrained: Sequence[Row]) -> str:
    """Accuracy in per cent, with its distance in the retrained models' standard deviations."""
    own = row["strata"].get(kind, {}).get(name)
    if own is None:
        return "–"
    text = f"{own['accuracy']:.1%}"
    others = [
        other["strata"][kind][name]["confidence"]
        for other in retrained
        if other["name"] != row["name"] and name in other["strata"].get(kind, {})
    ]
    if len(others) < LEAST - 1:
        return text
    away = deviation(own["confidence"], np.array(others))
    shown = "> 99" if isinf(away) or abs(away) > 99 else f"{away:+.1f}"
    return f"**{text} ({shown})**" if abs(away) > tolerance(len(others)) else f"{text} ({shown})"


def list_strata(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one Markdown table a kind of strata; none where no row has any.

    Args:
        rows: of a table, each with "name" and "role".
    """
    having = [row for row in rows if row.get("strata")]
    retrained = [row for row in having if row["role"] == "retrained"]
    for kind in having[0]["strata"] if having else ():
        sizes = {name: of["images"] for name, of in having[0]["strata"][kind].items()}
        names = list(sizes)
        if kind != "memorization":
            names = sorted(names, key=lambda name: -sizes[name])[:SHOWN]
        heads = [f"{name} ({sizes[name]})" for name in names]
        lines = [f"| by {kind} | {' | '.join(heads)} |", f"|---|{'---:|' * len(names)}"]
        for row in having:
            cells = (_cell(row, kind, name, retrained) for name in names)
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
        yield "\n".join(lines)
