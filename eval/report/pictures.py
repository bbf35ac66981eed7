"""One picture of a report, or the sentence in its place; and how models look in all of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

from letheon.eval.report.plots import BLUE, COLOURS, LINES, MARKERS, Look
from letheon.eval.report.rows import Prepared

PANELS = 4  # of one kind that are drawn; the JSON has all
Row = dict[str, Any]


class Picture(NamedTuple):
    """One picture of the page, or, without `image`, the sentence that stands in its place."""

    title: str
    caption: str
    image: str | None = None  # a data URI
    alt: str = ""


def marks(names: Sequence[str]) -> dict[str, Look]:
    """Name -> colour, marker and line, all different for up to 45 names."""
    return {
        name: Look(
            COLOURS[n % len(COLOURS)],
            MARKERS[n % len(MARKERS)],
            LINES[n // len(COLOURS) % len(LINES)],
        )
        for n, name in enumerate(names)
    }


def looks(prepared: Prepared) -> dict[str, Look]:
    """Model -> colour and marker; the original and the retrained models always look the same."""
    fixed = {"original": Look("#000000", "X"), "retrained": Look(BLUE, "s")}
    others = [row["name"] for row in prepared.of_role("control", "unlearned")]
    kept = {row["name"]: fixed[row["role"]] for row in prepared.of_role(*fixed)}
    return kept | marks(others)


def drawn(title: str, caption: str, svg: str, alt: str) -> Picture:
    """The picture with its drawing embedded."""
    code = base64.b64encode(svg.encode()).decode()
    return Picture(title, caption, f"data:image/svg+xml;base64,{code}", alt)


def told(values: Sequence[tuple[str, str]]) -> str:
    """An alternative text's facts, no more than a listener bears."""
    facts = [f"{name}: {value}" for name, value in values[:12]]
    more = [f"and {len(values) - 12} more in the table"] if len(values) > 12 else []
    return "; ".join(facts + more) + "."


def shown_name(prepared: Prepared, row: Row) -> str:
    """A model's name in a legend, where several retrained models share one entry."""
    seeds = len(prepared.of_role("retrained"))
    several = row["role"] == "retrained" and seeds > 1
    return f"retrained ({seeds} seeds)" if several else str(row["name"])


def _gap(row: Row) -> float:
    known = [row[key] for key in ("average_gap", "gap") if row.get(key) is not None]
    return float(known[0]) if known else 1.0


def chosen(prepared: Prepared, key: str) -> tuple[list[Row], str]:
    """Up to `PANELS` rows that have `key`, and a sentence that names the others.

    The original, one retrained model, then the unlearned ones nearest to the retrained.
    """
    having = [row for row in prepared.rows if row.get(key)]
    shown = [
        next(row for row in having if row["role"] == role)
        for role in ("original", "retrained")
        if any(row["role"] == role for row in having)
    ]
    rest = [row for row in having if row["role"] in ("unlearned", "control")]
    shown += sorted(rest, key=lambda row: (row["role"] == "control", _gap(row)))
    left = [row["name"] for row in having if row not in shown[:PANELS]]
    return shown[:PANELS], f" Not drawn, but in metrics.json: {', '.join(left)}." if left else ""
