"""The three-sample verdict: is a model one of the retrained ones, and to which side is it closer?

Every number is that of the table, so a verdict costs nothing to make again. The p-value is a
conformal one (Vovk, Gammerman and Shafer 2005): were the model one more retrained model, its
distance to the others would be as likely as any of theirs to be the largest. Each of the K + 1
models is scored by the same rule against the K others, which makes the rate at which a true
retrained model is flagged at most the level, whatever the numbers' distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from letheon.eval.audit.agreement import agreement
from letheon.eval.audit.false_positives import LEVEL
from letheon.eval.checks import Floats
from letheon.eval.metrics.reference import Row, numbers
from letheon.eval.metrics.registry import Metric, metrics

CUT = 10.0
"""Standard deviations at which a metric's distance is cut."""
ORACLES = 19
"""Retrained models below which no p-value reaches `LEVEL`: the smallest is 1 / (K + 1)."""


def _is_compared(metric: Metric) -> bool:
    """Whether a metric says of each model the same thing, without reading the retrained ones."""
    relative = {"reference", "retrained", "several runs"} & set(metric.needs)
    return not relative and metric.better != "" and metric.group != "Cost"


def compared_keys(rows: Sequence[Row]) -> list[str]:
    """Select the metrics that every row has and that differ between the rows."""
    tables = [numbers(row) for row in rows]
    keys = [metric.key for metric in metrics().values() if _is_compared(metric)]
    return [k for k in keys if all(k in t for t in tables) and len({t[k] for t in tables}) > 1]


def _distance(of: Floats, others: Floats) -> float:
    """Root mean square over the metrics of the distance to the others' mean, in their deviations.

    A leak in the features alone shows in few metrics, so no median: head distillation, which only
    CKA, the few-shot probe and their kin expose, passed by one on 24 retrained models of the
    digits. Each distance is cut at `CUT`, so that none decides alone.
    """
    spread = np.maximum(others.std(axis=0, ddof=1), 1e-9)
    away = np.minimum(np.abs(of - others.mean(axis=0)) / spread, CUT)
    return float(np.sqrt(np.mean(away**2)))


def p_value(model: Row, retrained: Sequence[Row]) -> float:
    """Share of the K + 1 models that lie as far from the others as this one; at least 1 / (K + 1).

    Args:
        model: its row.
        retrained: rows of K retrained models, two at least.
    """
    rows = [model, *retrained]
    keys = compared_keys(rows)
    if not keys:
        return 1.0
    table = np.array([[numbers(row)[key] for key in keys] for row in rows])
    scores = [_distance(table[i], np.delete(table, i, axis=0)) for i in range(len(table))]
    return float(np.mean([score >= scores[0] - 1e-12 for score in scores]))


def is_closer_to_retrained(model: Row, original: Row, retrained: Sequence[Row]) -> bool | None:
    """Tell whether the model lies beyond the middle on the way from the original to the retrained.

    None where no number tells these two apart. Metrics count in units of the retrained models'
    spread, so those that tell both sides apart decide, and those that do not have no say.
    """
    keys = compared_keys([model, original, *retrained])
    ours, before, *others = (
        np.array([numbers(row)[key] for key in keys]) for row in (model, original, *retrained)
    )
    spread = np.std(others, axis=0, ddof=1) if len(others) > 1 else np.ones(len(keys))
    spread = np.maximum(spread, 1e-3)
    way = (np.mean(others, axis=0) - before) / spread
    if not way @ way:
        return None
    return bool(((ours - before) / spread) @ way > 0.5 * (way @ way))


def _side(row: Row, original: Row, retrained: Sequence[Row]) -> str:
    """Say which of the two a model is closer to, with the p-value where the answers were compared.

    At full depth the forget images decide (`eval.membership.closeness`), else the numbers of the
    table, which give no p-value.
    """
    share, p = row.get("closer_to_retrained"), row.get("closer_p")
    if share is None or p is None:
        near = is_closer_to_retrained(row, original, retrained)
        if near is None:
            return "not decidable: no number tells the original from the retrained models"
        return f"closer to the {'retrained models' if near else 'original model'}"
    if p > LEVEL:
        return f"as near to the original model as to the retrained models, p = {p:.3f}"
    side = "retrained models" if share > 0.5 else "original model"
    of, chance = max(share, 1 - share), "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"closer to the {side} on {of:.0%} of the forget images, {chance}"


def judge(rows: Sequence[Row]) -> list[str]:
    """Write one line a model that was to forget, and one on how far the metrics agree.

    There is none where there is no retrained model.

    Args:
        rows: of a table, each with "name" and "role".
    """
    retrained = [row for row in rows if row["role"] == "retrained"]
    original = next((row for row in rows if row["role"] == "original"), None)
    lines = []
    for row in rows if retrained else ():
        if row["role"] not in ("unlearned", "control"):
            continue
        words = [] if original is None else [_side(row, original, retrained)]
        if len(retrained) < ORACLES:
            words.append(
                f"whether it could be one of the retrained models is not decidable from "
                f"{len(retrained)}: a p-value of {LEVEL:.0%} needs {ORACLES}"
            )
        else:
            p = p_value(row, retrained)
            like = "could be" if p > LEVEL else "is not"
            words.append(f"{like} one of the {len(retrained)} retrained models, p = {p:.3f}")
        lines.append(f"{row['name']}: {'; '.join(words)}")
    ranks = agreement(rows) if retrained else None
    return lines if ranks is None else [*lines, f"no single score: {ranks.sentence}"]
