"""The report as one HTML page: no script, nothing fetched, readable on a telephone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from letheon.eval.metrics.reference import Band
from letheon.eval.metrics.registry import IDEALS
from letheon.eval.report.definitions import define, format_title, format_value
from letheon.eval.report.pictures import Picture, distance_to_retrained
from letheon.eval.report.rows import Prepared
from letheon.eval.report.tables import describe_seeds, format_band
from letheon.eval.report.verdict import judge, name_request, tell_disagreement

Row = dict[str, Any]
_MARKS = (
    "Nearest to the retrained models first, controls apart. Under a value: its difference to the "
    "retrained mean in the same unit; ≈ where that is within two standard deviations of the "
    "retrained models, which are scored against the mean of one another. † unverified: our reading "
    "of a published score. A column's name leads to its definition."
)
_PARTS = (("original", "retrained"), ("unlearned",), ("control",))
_TITLES = ("", "Unlearned, nearest to the retrained first", "Controls")


def _delta(key: str, row: Row, prepared: Prepared) -> str:
    """Write a value's distance to the retrained models' mean, where it should equal it."""
    of, value = define(key), row.get(key)
    bands = prepared.reference.bands if prepared.reference else {}
    if of.better != "as retrained" or row["role"] == "retrained" or key not in bands:
        return ""
    band = bands[key]
    away = value - band.mean if value is not None else 0.0
    inside = band.std is not None and abs(away) <= 2 * band.std
    text = f"{'≈ ' if inside else ''}{'+' if away >= 0 else '−'}{format_value(key, abs(away))}"
    return "" if value is None else text


def _mean_cell(key: str, band: Band | None) -> Row:
    """Mean, spread and interval of the retrained models."""
    if band is None:
        return {"value": "–"}
    if band.low is None or band.high is None:
        return {"value": format_band(key, band)}
    ends = f"{format_value(key, band.low)} to {format_value(key, band.high)}"
    return {"value": format_band(key, band), "below": ends}


def _cell(key: str, row: Row, prepared: Prepared, best: float | None) -> Row:
    value, why = row.get(key), (row.get("why") or {}).get(key)
    return {
        "value": format_value(key, value),
        "below": _delta(key, row, prepared),
        "why": str(why) if why else "",
        "best": value is not None and value == best and row["role"] == "unlearned",
    }


def _head(key: str, title: str = "") -> Row:
    of = define(key)
    return {
        "key": key,
        "title": title or format_title(key),
        "text": of.text,
        "ideal": IDEALS.get(of.better, ""),
    }


def _table(title: str, heads: Sequence[Row], words: bool, prepared: Prepared) -> Row:
    """Lay out one table of the page; `words` asks for the definitions below it."""
    keys = [head["key"] for head in heads]
    rows = [row for row in prepared.rows if any(row.get(key) is not None for key in keys)]
    best: dict[str, float] = {}
    for key in keys:
        values = [r[key] for r in rows if r["role"] == "unlearned" and r.get(key) is not None]
        if values and key in ("gap", "average_gap"):
            best[key] = min(values)
    parts = []
    for roles, name in zip(_PARTS, _TITLES, strict=True):
        own = [row for row in rows if row["role"] in roles]
        if roles != _PARTS[0]:
            own.sort(key=distance_to_retrained)
        lines = [
            {
                "number": prepared.rows.index(row),
                "name": row["name"],
                "role": row["role"] if row["role"] != row["name"] else "",
                "cells": [_cell(key, row, prepared, best.get(key)) for key in keys],
            }
            for row in own
        ]
        if roles == _PARTS[0] and (mean := _mean_row(keys, prepared)):
            lines.append(mean)
        if lines:
            parts.append({"title": name, "rows": lines})
    reasons = [
        f"{row['name']}, {format_title(key)}: {row['why'][key]}"
        for row in rows
        for key in keys
        if row.get(key) is None and (row.get("why") or {}).get(key)
    ]
    return {
        "id": "table-" + "".join(c if c.isalnum() else "-" for c in title.lower()),
        "title": title, "heads": heads, "parts": parts, "words": heads if words else [],
        "reasons": reasons if words else [], "note": "" if words else _MARKS,
    }  # fmt: skip


def _mean_row(keys: Sequence[str], prepared: Prepared) -> Row | None:
    """Lay out the line of the retrained models' mean, where there are several."""
    of = prepared.reference
    if of is None or of.seeds < 2 or not any(key in of.bands for key in keys):
        return None
    cells = [_mean_cell(key, of.bands.get(key)) for key in keys]
    return {"name": "retrained", "role": describe_seeds(of.seeds), "cells": cells, "mean": True}


def page(
    prepared: Prepared,
    pictures: Sequence[Picture],
    heading: str,
    facts: Mapping[str, str] | None = None,
    examples: Mapping[str, Any] | None = None,
    site: str = "",
) -> str:
    """Write the whole document; Jinja2 escapes every text.

    Args:
        prepared: the rows.
        pictures: as `draw_pictures` gives them.
        heading: of the page.
        facts: what was measured and when, by name, for the head of the page.
        examples: as `eval.examples.find_examples` gives them.
        site: address of what `letheon serve` shows, which has the style and the script; empty for a
            page that is one file.
    """
    tables = []
    if prepared.summary:
        heads = [_head(key, column.head) for key, column in prepared.summary]
        tables.append(_table("Summary", heads, False, prepared))
    tables += [
        _table(group, [_head(key) for key in keys], True, prepared)
        for group, keys in prepared.columns.items()
    ]
    place = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=place, autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        heading=heading, facts=facts or {}, count=len(prepared.rows), sentence=prepared.sentence,
        kind=name_request(prepared.rows),
        verdicts=[*judge(prepared.rows), *tell_disagreement(prepared.rows)],
        tables=tables, pictures=pictures, examples=examples, site=site,
    )  # fmt: skip
