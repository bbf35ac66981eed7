"""Tables of the strata: each model's accuracy on parts of the forget set, beside the retrained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isinf

import numpy as np

from letheon.eval.audit.false_positives import LEAST, deviation, tolerance
from letheon.eval.metrics.reference import Row

SHOWN = 10
"""Strata of a kind that are shown, those of the most images."""


def _away(row: Row, kind: str, name: str, retrained: Sequence[Row]) -> tuple[float, bool] | None:
    """Distance of a stratum from the other retrained models', and whether that accuses the row."""
    own = row["strata"].get(kind, {}).get(name)
    others = [
        other["strata"][kind][name]["confidence"]
        for other in retrained
        if other["name"] != row["name"] and name in other["strata"].get(kind, {})
    ]
    if own is None or len(others) < LEAST - 1:
        return None
    away = deviation(own["confidence"], np.array(others))
    return away, abs(away) > tolerance(len(others))


def _cell(row: Row, kind: str, name: str, retrained: Sequence[Row]) -> str:
    """Accuracy in per cent, with its distance in the retrained models' standard deviations."""
    own = row["strata"].get(kind, {}).get(name)
    if own is None:
        return "–"
    text = f"{own['accuracy']:.1%}"
    found = _away(row, kind, name, retrained)
    if found is None:
        return text
    away, accused = found
    shown = "> 99" if isinf(away) or abs(away) > 99 else f"{away:+.1f}"
    return f"**{text} ({shown})**" if accused else f"{text} ({shown})"


def _rate(kind: str, name: str, retrained: Sequence[Row]) -> str:
    """How many of the retrained models a stratum accuses, each beside the others."""
    found = [_away(row, kind, name, retrained) for row in retrained]
    accused = [one[1] for one in found if one is not None]
    return f"{sum(accused)} of {len(accused)}" if accused else "–"


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
        rates = (_rate(kind, name, retrained) for name in names)
        lines.append(f"| *retrained models in bold* | {' | '.join(rates)} |")
        yield "\n".join(lines)
