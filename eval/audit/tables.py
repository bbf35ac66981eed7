"""Write the audit of a table as Markdown: verdicts, false positives, spreads, disagreement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isinf
from typing import Any

from letheon.eval.audit.agreement import agreement
from letheon.eval.audit.false_positives import (
    LEAST,
    LEVEL,
    FalsePositives,
    accusers,
    any_rate,
    as_facts,
    deviations,
    false_positives,
    tolerance,
)
from letheon.eval.audit.originals import list_places
from letheon.eval.audit.remarks import list_remarks, remark_facts
from letheon.eval.audit.strata import list_strata
from letheon.eval.metrics.reference import Band, Row
from letheon.eval.report.definitions import define, format_title
from letheon.eval.report.tables import format_band
from letheon.eval.report.verdict import CHOICE, ORACLES, judge, name_request

_STRATA = (
    "Accuracy on the forget images of each stratum (their number in brackets); behind it, how many "
    "standard deviations the mean probability of the label lies from the retrained models', in "
    "bold where that accuses the model. `metrics.json` has all strata."
)
_ORIGINALS = (
    "Originals of other seeds were trained on everything and forgot nothing. Counted are the "
    "numbers that tell them from the retrained models: in whose prediction interval does a model "
    "lie? What is within the originals' own spread is no sign of forgetting. A model made from the "
    "original often has a CKA to it above that of another original: it is still that network."
)
_REMARKS = (
    "Each retrained model is judged as if it had unlearned, with itself left out. What is said of "
    f"more than {LEVEL:.0%} of them is in bold: it is no evidence against a model. A remark by "
    "itself is held to that level; that any of several is said of a retrained model is likelier."
)
SHOWN = 12
"""Metrics that accuse a model, of which the table names the strongest."""


def _rates(by_key: dict[str, FalsePositives], seeds: int) -> list[str]:
    """One line a metric, those that accuse most first."""
    worst = sorted(by_key.values(), key=lambda each: (-each.rate, each.key))
    lines = [
        "| metric | retrained models | accused | rate | 95 % bound |",
        "|---|---:|---:|---:|---:|",
    ]
    for each in worst:
        band = Band(each.mean, each.std, None, None, each.seeds)
        count = f"{len(each.flagged)} of {each.seeds}"
        lines.append(
            f"| {format_title(each.key)} | {format_band(each.key, band)} | {count} "
            f"| {each.rate:.0%} | {each.bound:.0%} |"
        )
    over = sum(each.rate > LEVEL for each in worst)
    return [
        f"A metric accuses a model that lies more than {tolerance(seeds - 1):.2f} standard "
        f"deviations from the mean of the other {seeds - 1} retrained models (Student's prediction "
        f"interval, {LEVEL:.0%}). {over} of {len(worst)} metrics accuse more than {LEVEL:.0%} of "
        f"the retrained models; at least one accuses {any_rate(by_key, seeds):.0%} of them: "
        "one accusation among so many proves nothing: the verdict is what counts.",
        "",
        *lines,
    ]


def _distance(value: float) -> str:
    return "> 99" if isinf(value) or abs(value) > 99 else f"{value:+.1f}"


def _spreads(rows: Sequence[Row], retrained: Sequence[Row]) -> list[str]:
    """One line a model: by how many metrics it is accused, and the strongest of them."""
    lines = ["| model | accused by | strongest, in standard deviations |", "|---|---:|---|"]
    for row in rows:
        away = deviations(row, retrained)
        names = sorted(accusers(away), key=lambda key: -abs(away[key][0]))
        shown = [f"{define(key).title} {_distance(away[key][0])}" for key in names[:SHOWN]]
        lines.append(f"| {row['name']} | {len(names)} of {len(away)} | {', '.join(shown) or '–'} |")
    return lines


def as_audit(rows: Sequence[Row]) -> str:
    """Write audit.md; everything is read from the rows.

    Args:
        rows: prepared, each with "name" and "role".
    """
    retrained = [row for row in rows if row["role"] == "retrained"]
    parts = ["# The audit of this table", *filter(None, [name_request(rows)])]
    if verdicts := judge(rows):
        parts.append("\n".join(f"- {line}" for line in verdicts))
    if len(retrained) >= ORACLES:
        parts.append(CHOICE)
    found = false_positives(rows)
    if not found:
        parts.append(
            f"False-positive rates are not decidable from {len(retrained)} retrained models; "
            f"{LEAST} give a first spread, {ORACLES + 1} a rate of 5 %."
        )
    else:
        parts += [
            "## How often a retrained model is accused",
            "\n".join(_rates(found, len(retrained))),
        ]
        parts += [
            "## In units of the retrained models' spread",
            "\n".join(_spreads(rows, retrained)),
        ]
    if lines := list(list_remarks(rows)):
        title = "## How often each remark is said of a retrained model"
        parts += [title, _REMARKS, "\n".join(lines)]
    if lines := list(list_places(rows)):
        parts += ["## Beside originals of other seeds", _ORIGINALS, "\n".join(lines)]
    if tables := list(list_strata(rows)):
        parts += ["## By stratum", _STRATA, *tables]
    if (ranks := agreement(rows)) is not None:
        worst = [
            f"- {define(a).title} against {define(b).title}: {tau:+.2f}"
            for a, b, tau in ranks.worst_pairs()
        ]
        parts += ["## Disagreement", ranks.sentence + ". Most opposed:", "\n".join(worst)]
    return "\n\n".join(parts) + "\n"


def as_audit_json(rows: Sequence[Row]) -> str:
    """Write audit.json: false positives by metric and remark, deviations, taus of all pairs."""
    retrained = [row for row in rows if row["role"] == "retrained"]
    found, ranks = false_positives(rows), agreement(rows)
    document: dict[str, Any] = {
        "level": LEVEL,
        "false_positives": list(as_facts(found)),
        "remarks": remark_facts(rows),
        "deviations": {
            row["name"]: {
                key: None if isinf(value) else value
                for key, (value, _) in deviations(row, retrained).items()
            }
            for row in rows
        },
        "agreement": None
        if ranks is None
        else {"metrics": list(ranks.keys), "models": ranks.models, "taus": ranks.taus.tolist()},
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
