"""The report as one HTML page: no script, nothing fetched, readable on a telephone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from letheon.eval.metrics.reference import Band
from letheon.eval.metrics.registry import IDEALS, Better
from letheon.eval.report.definitions import define, format_title, format_value
from letheon.eval.report.pictures import Picture
from letheon.eval.report.rows import Prepared
from letheon.eval.report.tables import describe_seeds, format_band

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2rem) 4rem; max-width: 72rem;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1b1b1b;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
a { color: #005a9c; }
.lead { max-width: 46rem; }
.scroll { overflow-x: auto; border: 1px solid #ccc; border-radius: 4px;
  background:
    linear-gradient(to left, #fff 2rem, transparent 4rem) right / 4rem 100% no-repeat local,
    linear-gradient(to left, #0003, transparent) right / 1rem 100% no-repeat scroll; }
.scroll:focus-visible { outline: 2px solid #005a9c; }
table { border-collapse: separate; border-spacing: 0; font-size: .86rem; width: 100%; }
th, td { padding: .35rem .5rem; text-align: right; white-space: nowrap; vertical-align: top;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid #e4e4e4; }
thead th { vertical-align: bottom; background: #f3f3f3; font-weight: 600; white-space: normal;
  min-width: 5.2rem; overflow-wrap: normal; }
thead th a { color: inherit; text-decoration-style: dotted; }
tbody th, thead th:first-child { position: sticky; left: 0; text-align: left; background: #fff;
  border-right: 1px solid #ccc; font-weight: 500; white-space: normal; z-index: 1;
  min-width: clamp(6.5rem, 20vw, 13rem); max-width: 13rem; }
thead th:first-child { background: #f3f3f3; }
tr.mean td, tr.mean th { background: #e8f1f8; font-weight: 600; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
small { display: block; color: #595959; font-size: .78em; font-weight: 400; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: #005a9c; padding: .3rem 0; }
dt { font-weight: 600; margin-top: .5rem; }
dt:target, dt:target + dd { background: #fff3c4; }
dd { margin: 0 0 .3rem 1rem; }
.pictures { columns: 28rem 2; column-gap: 1.2rem; }
figure { margin: 0 0 1.2rem; padding: .8rem; border: 1px solid #ccc; border-radius: 4px;
  break-inside: avoid; }
figure h3 { margin: 0 0 .4rem; font-size: 1rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #444; }
.absent { font-size: .92rem; padding-left: 1.2rem; }
@media print { .scroll { overflow: visible; } details { display: block; } }
"""


def _delta(key: str, row: dict[str, Any], prepared: Prepared) -> str:
    """Write a value's distance to the retrained models' mean, where it should equal it."""
    of, value = define(key), row.get(key)
    bands = prepared.reference.bands if prepared.reference else {}
    if of.better != "as retrained" or row["role"] == "retrained" or key not in bands:
        return ""
    band = bands[key]
    away = value - band.mean if value is not None else 0.0
    inside = band.std is not None and abs(away) <= 2 * band.std
    text = f"{'≈ ' if inside else ''}{'+' if away >= 0 else '−'}{format_value(key, abs(away))}"
    return "" if value is None else f"<small>{text}</small>"


def _mean(key: str, band: Band | None) -> str:
    """Mean, spread and interval of the retrained models."""
    if band is None:
        return "–"
    if band.low is None or band.high is None:
        return format_band(key, band)
    ends = f"{format_value(key, band.low)} to {format_value(key, band.high)}"
    return f"{format_band(key, band)}<small>{ends}</small>"


def _line(row: dict[str, Any], keys: Sequence[str], prepared: Prepared) -> str:
    why = row.get("why") or {}
    cells = []
    for key in keys:
        reason = f' title="{escape(str(why[key]))}"' if why.get(key) else ""
        cells.append(
            f"<td{reason}>{format_value(key, row.get(key))}{_delta(key, row, prepared)}</td>"
        )
    role = row["role"]
    return (
        f'<tr><th scope="row">{escape(row["name"])}<small>{role}</small></th>{"".join(cells)}</tr>'
    )


def _table(group: str, keys: Sequence[str], prepared: Prepared) -> str:
    heads = "".join(
        f'<th scope="col"><a href="#def-{escape(key)}" title="{escape(define(key).text)}">'
        f"{escape(format_title(key))}</a></th>"
        for key in keys
    )
    lines = []
    bands = prepared.reference.bands if prepared.reference else {}
    if prepared.reference and any(key in bands for key in keys):
        seeds = prepared.reference.seeds
        cells = "".join(f"<td>{_mean(key, bands.get(key))}</td>" for key in keys)
        lines.append(
            f'<tr class="mean"><th scope="row">retrained<small>{describe_seeds(seeds)}</small></th>'
            f"{cells}</tr>"
        )
    rows = [row for row in prepared.rows if any(row.get(key) is not None for key in keys)]
    lines += [_line(row, keys, prepared) for row in rows]
    texts = "".join(
        f'<dt id="def-{escape(key)}">{escape(format_title(key))}</dt><dd>{escape(define(key).text)}'
        f"{_ideal(define(key).better)}</dd>"
        for key in keys
    )
    return f"""<section><h2>{escape(group)}</h2>
<div class="scroll" tabindex="0" role="region" aria-label="{escape(group)}, table">
<table><thead><tr><th scope="col">Model</th>{heads}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>
<details><summary>What these numbers are</summary><dl>{texts}</dl></details>
{_reasons(rows, keys)}</section>"""


def _ideal(better: Better) -> str:
    return f" <em>{IDEALS[better]}</em>" if better in IDEALS else ""


def _reasons(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    texts = [
        f"<li>{escape(row['name'])}, {escape(format_title(key))}: "
        f"{escape(str(row['why'][key]))}</li>"
        for row in rows
        for key in keys
        if row.get(key) is None and (row.get("why") or {}).get(key)
    ]
    if not texts:
        return ""
    return f"<details><summary>Why cells are empty</summary><ul>{''.join(texts)}</ul></details>"


def _figure(picture: Picture) -> str:
    return (
        f"<figure><h3>{escape(picture.title)}</h3>"
        f'<img src="{picture.image}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _absent(pictures: Sequence[Picture]) -> str:
    texts = [f"<li><b>{escape(p.title)}.</b> {escape(p.caption)}</li>" for p in pictures]
    return f'<ul class="absent">{"".join(texts)}</ul>' if texts else ""


def page(prepared: Prepared, pictures: Sequence[Picture], heading: str) -> str:
    """Write the whole document; every text of a row is escaped."""
    tables = [_table(group, keys, prepared) for group, keys in prepared.columns.items()]
    figures = "\n".join(_figure(p) for p in pictures if p.image is not None)
    marks = (
        "Under a value: its difference to the retrained mean in the same unit; ≈ where that is "
        "within two standard deviations of the retrained models. Those are scored against the "
        "mean of one another. † unverified: our reading of a published score."
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title><style>{_STYLE}</style></head>
<body><header><h1>{escape(heading)}</h1>
<p class="lead">{len(prepared.rows)} models. {escape(prepared.sentence)}</p>
<p class="lead">{marks} A column's name leads to its definition.</p></header>
<main>
{"".join(tables[:2])}
<section><h2>Pictures</h2><div class="pictures">{figures}</div>
{_absent([p for p in pictures if p.image is None])}</section>
{"".join(tables[2:])}
</main></body></html>
"""
