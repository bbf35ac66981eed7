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

from letheon.eval.audit.agreement import LEAST, agreement
from letheon.eval.audit.conditions import (
    describe_answers,
    describe_distance,
    describe_features,
    describe_loss,
    describe_recall,
)
from letheon.eval.audit.false_positives import LEAST as SPREAD
from letheon.eval.audit.false_positives import LEVEL, tolerance
from letheon.eval.audit.originals import describe_places
from letheon.eval.checks import Floats
from letheon.eval.metrics.reference import Row, numbers
from letheon.eval.metrics.registry import Metric, metrics

CUT = 10.0
"""Standard deviations at which a metric's distance is cut."""
CHOICE = (
    "How to read p of 'one of them': the root mean square was chosen of six distances by looking "
    "at 24 retrained digits and a head distillation, which a median had passed, so that it finds "
    "that one was seen in-sample. On other digits it found none of 4 leaks of 2 % of the forget "
    "set, 3 of 4 of 10 % and 4 of 4 of 50 % (docs/results/power-digits.md). The rate at which true "
    "retrained models are accused was not chosen: it holds for any rule that was fixed before."
)
"""What is to be said where the p-values are printed."""
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
    tables = [numbers(row) for row in rows]
    table = np.array([[of[key] for key in keys] for of in tables])
    scores = [_distance(table[i], np.delete(table, i, axis=0)) for i in range(len(table))]
    return float(np.mean([score >= scores[0] - 1e-12 for score in scores]))


def is_closer_to_retrained(model: Row, original: Row, retrained: Sequence[Row]) -> bool | None:
    """Tell whether the model lies beyond the middle on the way from the original to the retrained.

    None where no number tells these two apart. Metrics count in units of the retrained models'
    spread, so those that tell both sides apart decide, and those that do not have no say: of three
    retrained models or more, all in whose prediction interval the original lies.
    """
    keys = compared_keys([model, original, *retrained])
    tables = [numbers(row) for row in (model, original, *retrained)]
    ours, before, *others = (np.array([of[key] for key in keys]) for of in tables)
    spread = np.std(others, axis=0, ddof=1) if len(others) > 1 else np.ones(len(keys))
    spread = np.maximum(spread, 1e-3)
    way = (np.mean(others, axis=0) - before) / spread
    if len(others) >= SPREAD:
        way = np.where(np.abs(way) > tolerance(len(others)), way, 0.0)
    if not way @ way:
        return None
    return bool(((ours - before) / spread) @ way > 0.5 * (way @ way))


def _side(row: Row, originals: Sequence[Row], retrained: Sequence[Row]) -> str:
    """Say which of the two a model is closer to, with the p-value where the answers were compared.

    At full depth the forget images decide (`eval.membership.closeness`), else the numbers of the
    table, which give no p-value. No side is named of a model that lost what was to be kept, nor
    where models that are known to be of the other side answer so too (`describe_answers`). What
    speaks against the side of the retrained models is said behind it.
    """
    if lost := describe_loss(row, retrained):
        return lost
    share, p = row.get("closer_to_retrained"), row.get("closer_p")
    if share is None or p is None:
        near = is_closer_to_retrained(row, originals[0], retrained)
        if near is None:
            return "not decidable: no number tells the original from the retrained models"
        text = f"closer to the {'retrained models' if near else 'original model'}"
    elif p > LEVEL:
        return f"as near to the original model as to the retrained models, p = {p:.3f}"
    else:
        near = share > 0.5
        text = describe_answers(row, originals, retrained)
    against = [
        describe_distance(row, retrained),
        describe_features(row, retrained),
        describe_recall(row, originals, retrained),
    ]
    words = " and ".join(filter(None, against))
    return f"{text}, but {words}" if near and words and text.startswith("closer") else text


def name_request(rows: Sequence[Row]) -> str:
    """Say which kind of forgetting was asked for, and what the retrained models are a reference of.

    Undoing the effect of samples ("untraining") and removing a concept ("unlearning") have
    different references (arXiv 2604.07962). Nothing where the rows do not say what was forgotten.
    """
    row = rows[0]
    names, numbers = row.get("classes") or [], row.get("forgotten")
    if numbers is None:
        return ""
    if not numbers:
        return (
            "Single samples were to be forgotten: their effect is to be undone (untraining), and "
            "the retrained models are its reference. A retrained model may still be right on them."
        )
    classes = ", ".join(str(names[n]) if n < len(names) else str(n) for n in numbers)
    return (
        f"Whole classes were to be forgotten ({classes}). The retrained models say whether the "
        "effect of their images is undone (untraining); whether the concept is gone (unlearning) "
        "is said by TFA and the probes, on which a retrained model need not be at chance."
    )


def _odds(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


_RECALLED = ("canary_recovery", "canary_chance", "canary_rank", "canaries")
"""What `_recall` reads of the row; a row from elsewhere may lack some."""


def _recall(row: Row, rows: Sequence[Row]) -> str:
    """Say how many canaries a model remembers, beside chance, the original and the retrained."""
    beside = [f"chance {row['canary_chance']:.1%}"]
    for role in ("original", "retrained"):
        of = [r.get("canary_recovery") for r in rows if r["role"] == role]
        known = [value for value in of if value is not None]
        if known:
            beside.append(f"{role} {np.mean(known):.1%}")
    text = (
        f"names {row['canary_recovery']:.1%} of {row['canaries']['forget']} canaries by their "
        f"planted label ({', '.join(beside)}), which ranks above {row['canary_rank']:.0%} of the "
        "wrong ones (50% if never seen)"
    )
    p = row.get("canary_p")
    text = text if p is None else f"{text}, {_odds(p)}"
    known = [r.get("canary_p") for r in rows if r["role"] == "original"]
    odds = [value for value in known if value is not None]
    if odds and min(odds) > LEVEL:  # nobody forgets what was never learned
        text += f"; the original itself had not learned them ({_odds(min(odds))}): they say nothing"
    return text


def _is_one(row: Row, retrained: Sequence[Row]) -> str:
    """Say whether a model could be one more retrained one, with the p-value where there is one."""
    count = len(retrained)
    if count < ORACLES:
        return (
            f"whether it could be one of the retrained models is not decidable from {count}: a "
            f"p-value of {LEVEL:.0%} needs {ORACLES}"
        )
    p = p_value(row, retrained)
    like = "could be" if p > LEVEL else "is not"
    return f"{like} one of the {count} retrained models, p = {p:.3f}"


def judge_one(row: Row, rows: Sequence[Row]) -> str:
    """Say of one model what the retrained models, the originals and the canaries tell of it.

    Args:
        row: of the model.
        rows: of the table, each with "name" and "role".

    Returns:
        Nothing where there are neither retrained models nor canaries.
    """
    retrained = [other for other in rows if other["role"] == "retrained"]
    originals = [other for other in rows if other["role"] == "original"]
    words = []
    if retrained and originals:
        words.append(_side(row, originals, retrained))
    if retrained:
        words.append(_is_one(row, retrained))
    if placed := describe_places(row, rows):
        words.append(placed)
    if all(row.get(key) is not None for key in _RECALLED):
        words.append(_recall(row, rows))
    return "; ".join(words)


def judge(rows: Sequence[Row]) -> list[str]:
    """Write a line for each model that was to forget, one for all of whom the same is said.

    It needs a retrained model or canaries. What makes the numbers of some rows worth less than they
    look ("doubts") stands before all.

    Args:
        rows: of a table, each with "name" and "role".
    """
    lines: dict[str, list[str]] = {}
    for row in _unlearned_rows(rows):
        if words := judge_one(row, rows):
            lines.setdefault(words, []).append(str(row["name"]))
    doubts = dict.fromkeys(text for row in rows for text in row.get("doubts") or ())
    return [f"beware: {text}" for text in doubts] + [
        f"{', '.join(names)}: {'each ' if len(names) > 1 else ''}{text}"
        for text, names in lines.items()
    ]


def _unlearned_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["role"] in ("unlearned", "control")]


def tell_disagreement(rows: Sequence[Row]) -> list[str]:
    """Say how far the metrics agree in ranking the models; stands wherever a score stands.

    Nothing where fewer than two models were to forget: none is ranked.
    """
    ranks, models = agreement(rows), len(_unlearned_rows(rows))
    if ranks is not None:
        return [f"no single score: {ranks.sentence}"]
    if models < 2:
        return []
    return [
        f"no single score: how far the metrics agree cannot be told from {models} models; "
        f"{LEAST} are needed"
    ]
