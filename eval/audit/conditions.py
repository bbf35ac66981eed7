"""Conditions of the verdict's first half: which side a model is closer to does not say enough.

What destroys a model moves its answers, too, and on some side of the middle they lie; and a head
that was made to answer as a retrained model's hides features that are the original's. So the side
is not named where a model lost what was to be kept, and what contradicts it is said beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from letheon.eval.audit.false_positives import LEAST, tolerance
from letheon.eval.metrics.reference import Row, numbers

FAR = 2.0
"""Times their own distance at which a model is said to lie far from the retrained models, where
these are too few to have distances of their own."""


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [of[key] for of in map(numbers, rows) if key in of]


def describe_loss(row: Row, retrained: Sequence[Row]) -> str:
    """Say that a model lost what was to be kept; nothing where it did not.

    It did where its TRA (RA, where nothing is held out) is not above half way from an even guess
    among the classes that were kept to the retrained models' mean.
    """
    classes = len(row.get("classes") or ()) - len(row.get("forgotten") or ())
    for key in ("TRA", "RA"):
        own, others = row.get(key), _values(retrained, key)
        if own is None or not others or classes < 1:
            continue
        chance, kept = 1 / classes, float(np.mean(others))
        if own > (chance + kept) / 2:
            return ""
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
    """Say how far from the retrained models the answers are, where that is farther than theirs."""
    own, others = row.get("margin_distance"), _values(retrained, "margin_distance")
    if own is None or own <= max(others, default=FAR):
        return ""
    return f"its answers lie {own:.1f} times as far from them as theirs from one another"


def describe_features(row: Row, retrained: Sequence[Row]) -> str:
    """Say that the features are more like the original's than a retrained model's ever are."""
    for key, where in (("cka_original", ""), ("cka_original_forget", " on the forgotten classes")):
        own, others = row.get(key), _values(retrained, key)
        if own is None or len(others) < LEAST:
            continue
        mean, std = float(np.mean(others)), float(np.std(others, ddof=1))
        if own > mean + tolerance(len(others)) * std:
            return (
                f"its features are more like the original's than a retrained model's{where} "
                f"(CKA {own:.3f}, theirs {mean:.3f} ± {std:.3f})"
            )
    return ""
