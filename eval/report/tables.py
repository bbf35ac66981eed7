"""A report's numbers as CSV, Markdown, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict
from typing import Any

from letheon.eval.metrics.reference import Band
from letheon.eval.metrics.scores import UNVERIFIED
from letheon.eval.report.definitions import define, printed
from letheon.eval.report.rows import Prepared

FORMAT = "letheon-metrics"
VERSION = 1
"""Of docs/metrics.schema.json; raised when a reader of the old one would misread the new."""


def title(key: str) -> str:
    """A column's head: the metric, a dagger where the formula is unverified, and per cent."""
    of = define(key)
    unit = " %" if of.unit == "share" else {"nats": " (nats)", "seconds": " (s)"}.get(of.unit, "")
    return of.title + ("†" if key in UNVERIFIED else "") + unit


def of_seeds(seeds: int) -> str:
    """What the line of the retrained models' mean is called."""
    return f"mean ± std of {seeds}" if seeds > 1 else "one seed, no spread"


def spread(key: str, of: Band) -> str:
    """Mean and standard deviation over the seeds, as printed."""
    mean = printed(key, of.mean)
    return mean if of.std is None else f"{mean} ± {printed(key, of.std)}"


def grids(prepared: Prepared) -> dict[str, list[list[str]]]:
    """Group -> printed cells: a head, the retrained models' mean, then one line a model."""
    tables = {}
    for group, keys in prepared.columns.items():
        lines = [["Model", *map(title, keys)]]
        bands = prepared.reference.bands if prepared.reference else {}
        if prepared.reference and any(key in bands for key in keys):
            cells = [spread(key, bands[key]) if key in bands else "–" for key in keys]
            lines.append([f"retrained, {of_seeds(prepared.reference.seeds)}", *cells])
        for row in prepared.rows:
            lines.append([row["name"], *(printed(key, row.get(key)) for key in keys)])
        tables[group] = lines
    return tables


def as_csv(prepared: Prepared) -> str:
    """One line a model, full precision, shares as fractions; empty where nothing was measured."""
    keys = [key for group in prepared.columns.values() for key in group]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["name", "role", "seed", "weights", *keys])
    for row in prepared.rows:
        weights = (row.get("conditions") or {}).get("digest")
        lines.writerow([row["name"], row["role"], row.get("seed"), weights, *map(row.get, keys)])
    return text.getvalue()


def as_markdown(prepared: Prepared) -> str:
    """A table a group, then every definition."""
    parts = [prepared.sentence]
    for group, grid in grids(prepared).items():
        cells = [[re.sub(r"\s*\n\s*", " ", c).replace("|", "\\|") for c in line] for line in grid]
        ruler = ["---", *("---:" for _ in cells[0][1:])]
        table = ["| " + " | ".join(line) + " |" for line in [cells[0], ruler, *cells[1:]]]
        texts = [f"- **{title(key)}**: {define(key).text}" for key in prepared.columns[group]]
        parts.append("\n".join([f"### {group}", "", *table, "", *texts]))
    return "\n\n".join(parts) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "–": "--",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def as_latex(prepared: Prepared) -> str:
    """A tabular a group, for booktabs; the definitions stand above as comments."""
    parts = ["% \\usepackage{booktabs}", "% " + prepared.sentence]
    for group, grid in grids(prepared).items():
        keys = prepared.columns[group]
        parts += [f"% {title(key)}: {define(key).text}" for key in keys]
        head, *body = [" & ".join(map(_latex, line)) + r" \\" for line in grid]
        parts += [f"\\begin{{tabular}}{{l{'r' * len(keys)}}}", f"% {group}", r"\toprule", head]
        parts += [r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(parts) + "\n"


def as_json(prepared: Prepared) -> str:
    """The rows whole, the reference with its bands, and the definitions; see the schema."""
    of = prepared.reference
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "reference": None
        if of is None
        else {
            "seeds": of.seeds,
            "sentence": of.sentence,
            "bands": {key: asdict(values) for key, values in of.bands.items()},
        },
        "rows": prepared.rows,
        "definitions": {
            key: {**define(key)._asdict(), "unverified": key in UNVERIFIED}
            for group in prepared.columns.values()
            for key in group
        },
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
