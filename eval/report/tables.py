"""Write a report's numbers: terminal text, Markdown, CSV, LaTeX and JSON from the same cells."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from letheon.eval.metrics.reference import Band
from letheon.eval.report.definitions import define, format_title, format_value
from letheon.eval.report.rows import Prepared
from letheon.eval.report.verdict import judge, name_request, tell_disagreement

FORMAT = "letheon-metrics"
VERSION = 1
"""Of docs/metrics.schema.json; raised when a reader of the old one would misread the new."""
Grid = list[list[str]]
"""Cells: a head, then one line a model."""


def describe_seeds(seeds: int) -> str:
    """Name the line of the retrained models' mean."""
    return f"mean ± std of {seeds}" if seeds > 1 else "one seed, no spread"


def format_band(key: str, of: Band) -> str:
    """Format mean and standard deviation over the seeds."""
    mean = format_value(key, of.mean)
    return mean if of.std is None else f"{mean} ± {format_value(key, of.std)}"


def _lines(prepared: Prepared, keys: Sequence[str]) -> Grid:
    """Format one line a model."""
    return [[row["name"], *(format_value(k, row.get(k)) for k in keys)] for row in prepared.rows]


def summary_grid(prepared: Prepared) -> Grid:
    """Lay out the short table, with its own heads."""
    keys = [key for key, _ in prepared.summary]
    return [["model", *(column.head for _, column in prepared.summary)], *_lines(prepared, keys)]


def group_grid(prepared: Prepared, group: str) -> Grid:
    """Lay out one group, the retrained models' mean before the models."""
    keys, of = prepared.columns[group], prepared.reference
    head = [["Model", *map(format_title, keys)]]
    bands = of.bands if of else {}
    if of and any(key in bands for key in keys):
        cells = [format_band(key, bands[key]) if key in bands else "–" for key in keys]
        head.append([f"retrained, {describe_seeds(of.seeds)}", *cells])
    return head + _lines(prepared, keys)


def legend(prepared: Prepared) -> list[str]:
    """Explain the short table: one line a column, then what k-NN and CKA were measured under."""
    width = max((len(column.head) for _, column in prepared.summary), default=0)
    lines = [f"{column.head:<{width}}  {column.legend}" for _, column in prepared.summary]
    return lines + _conditions(prepared)


def _conditions(prepared: Prepared) -> list[str]:
    """Describe the conditions in one line, where all rows say the same."""
    under = [row["conditions"] for row in prepared.rows if "conditions" in row]
    keys = ("ks", "metric", "weights", "temperature", "space", "split", "cka")
    if not under or any(other.get(k) != under[0].get(k) for other in under for k in keys):
        return []
    if not all(key in under[0] for key in keys):
        return []
    of = under[0]
    votes = of["weights"] + (f" {of['temperature']}" if of["temperature"] else "")
    space = "features" if of["space"] == "pooled" else "as features"
    return [
        f"k-NN: k = {of['ks'][0]}, {of['metric']}, {votes} votes, {of['space']} {space}, "
        f"{of['split']} 80/20 split. CKA: {of['cka']}."
    ]


def as_text(prepared: Prepared) -> str:
    """Write the short table for a terminal, aligned, with its legend."""
    grid = summary_grid(prepared)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = []
    for cells in grid:
        rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        lines.append("  ".join([f"{cells[0]:<{widths[0]}}", *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    out = [f"left out: {name}: {why}" for name, why in prepared.left_out.items()]
    verdicts = [*judge(prepared.rows), *tell_disagreement(prepared.rows)]
    out += [f"verdict: {line}" for line in verdicts]
    return "\n".join([*lines, *out, "", *legend(prepared)])


def as_csv(prepared: Prepared) -> str:
    """Write a line a model, full precision, shares as fractions; empty where nothing is known."""
    keys = [key for group in prepared.columns.values() for key in group]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["name", "role", "seed", "weights", *keys])
    for row in prepared.rows:
        weights = (row.get("conditions") or {}).get("digest")
        lines.writerow([row["name"], row["role"], row.get("seed"), weights, *map(row.get, keys)])
    return text.getvalue()


def _markdown(grid: Grid) -> list[str]:
    cells = [[re.sub(r"\s*\n\s*", " ", c).replace("|", "\\|") for c in line] for line in grid]
    ruler = ["---", *("---:" for _ in cells[0][1:])]
    return ["| " + " | ".join(line) + " |" for line in [cells[0], ruler, *cells[1:]]]


def as_markdown(prepared: Prepared) -> str:
    """Write the short table, then a table a group with every definition."""
    parts = [prepared.sentence]
    if prepared.summary:
        below = [f"- {line}" for line in legend(prepared)]
        parts.append("\n".join([*_markdown(summary_grid(prepared)), "", *below]))
    if verdicts := [*judge(prepared.rows), *tell_disagreement(prepared.rows)]:
        parts.insert(1, "\n".join(f"- {line}" for line in verdicts))
    if kind := name_request(prepared.rows):
        parts.insert(1, kind)
    for group, keys in prepared.columns.items():
        texts = [f"- **{format_title(key)}**: {define(key).text}" for key in keys]
        table = _markdown(group_grid(prepared, group))
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
    """Write a tabular a group, for booktabs; the definitions stand above as comments."""
    parts = ["% \\usepackage{booktabs}", "% " + " ".join(prepared.sentence.split())]
    for group, keys in prepared.columns.items():
        parts += [f"% {format_title(key)}: {define(key).text}" for key in keys]
        grid = group_grid(prepared, group)
        head, *body = [" & ".join(map(_latex, line)) + r" \\" for line in grid]
        parts += [f"\\begin{{tabular}}{{l{'r' * len(keys)}}}", f"% {group}", r"\toprule", head]
        parts += [r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(parts) + "\n"


def as_json(prepared: Prepared) -> str:
    """Write the rows whole, the reference with its bands, and the definitions; see the schema."""
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
            key: asdict(define(key)) for group in prepared.columns.values() for key in group
        },
    }
    if prepared.left_out:
        document["left_out"] = prepared.left_out
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
