"""Conditions of the verdict's first half: which side a model is closer to does not say enough.

What destroys a model moves its answers, too, and on some side of the middle they lie; and a head
that was made to answer as a retrained model's hides features that are the original's. So the side
is not named where a model lost what was to be kept, and what contradicts it is said beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from letheon.eval.audit.false_positives import LEAST, LEVEL, deviation, tolerance
from letheon.eval.metrics.reference import Row, numbers

FAR = 2.0
"""Times their own distance at which a model is said to lie far from the retrained models, where
these are too few to have distances of their own."""


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [of[key] for of in map(numbers, rows) if key in of]


def _is_above(own: float, others: Sequence[float]) -> bool:
    """Whether a number lies above the prediction interval of at least two others."""
    return deviation(own, np.array(others)) > tolerance(len(others))


def describe_loss(row: Row, retrained: Sequence[Row]) -> str:
    """Say that a model lost what was to be kept; nothing where it did not.

    It did where its TRA (RA, where nothing is held out) is not above half way from an even guess
    among the classes that were kept to the retrained models' mean, and below the retrained models'
    prediction interval. Where these are no better than a guess themselves, or one class was kept,
    nobody can tell.
    """
    classes = len(row.get("classes") or ()) - len(row.get("forgotten") or ())
    for key in ("TRA", "RA"):
        own, others = row.get(key), _values(retrained, key)
        if own is None or not others or classes < 2:
            continue
        chance, kept = 1 / classes, float(np.mean(others))
        if own >= kept or own > (chance + kept) / 2:
            return ""
        if len(others) >= LEAST and not _is_above(-own, [-value for value in others]):
            return ""
        if chance >= kept:
            continue
        count = ((row.get("counts") or {}).get(key) or (0, 1))[1]
        guessed = own <= chance + 2 * sqrt(chance * (1 - chance) / count)
        what = (
            "no better than an untrained network on"
            if guessed
            else "it has lost most of what it knew of"
        )
        return (
            f"no side is named: {what} what was to be kept ({key} {own:.1%}, retrained {kept:.1%}, "
            f"an even guess {chance:.1%}), which moves the answers to the forget images, too"
        )
    return ""


def describe_distance(row: Row, retrained: Sequence[Row]) -> str:
    """Say how far from the retrained models the answers are, where that is farther than theirs.

    Farther than their prediction interval: of four retrained models or more it accuses 3 to 6 % of
    true ones, simulated. Three have no distances of their own.
    """
    own, others = row.get("margin_distance"), _values(retrained, "margin_distance")
    if own is None:
        return ""
    far = _is_above(own, others) if len(others) >= LEAST else own > max([FAR, *others])
    return (
        f"its answers lie {own:.3g} times as far from them as theirs from one another"
        if far
        else ""
    )


def describe_features(row: Row, retrained: Sequence[Row]) -> str:
    """Say that the features are more like the original's than a retrained model's ever are."""
    for key, where in (("cka_original", ""), ("cka_original_forget", " on the forgotten classes")):
        own, others = row.get(key), _values(retrained, key)
        if own is None or len(others) < LEAST:
            continue
        if _is_above(own, others):
            mean, std = float(np.mean(others)), float(np.std(others, ddof=1))
            return (
                f"its features are more like the original's than a retrained model's{where} "
                f"(CKA {own:.3f}, theirs {mean:.3f} ± {std:.3f})"
            )
    return ""


_RECALLS = {
    "TFA": "it still names {own} of the held-out images of the forgotten classes",
    "attack_prompt": "with one learned offset it names {own} of the forget images",
    "attack_quantized": "with weights of 4 bits it names {own} of the forget images",
    "attack_retain_only": "as it learns from retain images it names {own} of the forget images",
}
"""Accuracies on what the sign test does not read, for one that answers as a retrained model on the
stored forget images alone."""


def describe_recall(row: Row, originals: Sequence[Row], retrained: Sequence[Row]) -> str:
    """Say that a model still knows what it no longer answers; the first of `_RECALLS` that tells.

    One does where it lies above the retrained models' prediction interval and nearer the original
    than them.
    """
    for key, words in _RECALLS.items():
        own, before = row.get(key), originals[0].get(key)
        others = _values(retrained, key)
        if own is None or before is None or not others:
            continue
        mean = float(np.mean(others))
        inside = len(others) >= LEAST and not _is_above(own, others)
        if inside or not own > (mean + before) / 2 > mean:
            continue
        return f"{words.format(own=f'{own:.1%}')} (retrained {mean:.1%}, original {before:.1%})"
    return ""


def describe_answers(row: Row, originals: Sequence[Row], retrained: Sequence[Row]) -> str:
    """Say which side a model's answers to the forget images are nearer to, where models tell.

    The sign test of `eval.membership.closeness` takes for granted that originals and retrained
    models spread alike: of a side that spreads less, all models are nearer to the other. So true
    models are asked, each measured without itself. The original's side is named only of a smaller
    share than any retrained model has, the retrained models' of a larger one than any original of
    another seed has.

    Args:
        row: of a model with "closer_to_retrained" and a "closer_p" of at most `LEVEL`.
        originals: rows of all originals; a single one has no share of its own.
        retrained: rows of the retrained models; fewer than four have none.
    """
    share, p = row["closer_to_retrained"], row["closer_p"]
    near = share > 0.5
    side, other = "retrained models", "originals of other seeds"
    shares = _values(originals, "closer_to_retrained")
    if not near:
        side, other = "original model", "retrained models"
        shares = _values(retrained, "closer_to_retrained")
    of, odds = max(share, 1 - share), "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    by = f"by its answers to {of:.0%} of the forget images, {odds}"
    alike = sum(one >= share if near else one <= share for one in shares)
    if alike:
        return (
            f"no side is named: nearer the {side} {by}, but as near or nearer are {alike} of the "
            f"{len(shares)} {other}"
        )
    text = f"closer to the {side} {by}"
    accused = [] if near else [one for one in retrained if _is_called_original(one)]
    if accused:
        text += f" (said of {len(accused)} of the {len(shares)} retrained models, too)"
    return text


def _is_called_original(row: Row) -> bool:
    share, p = row.get("closer_to_retrained"), row.get("closer_p")
    return share is not None and p is not None and share < 0.5 and p <= LEVEL
