"""The ROC curve of an attack score, exact under ties, and attacks matched by class.

A score is larger for a sample that looks more like a member of the training set. Every distinct
score is one threshold, so tied samples are always decided together; nothing is interpolated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from letheon.errors import InputError, NotMeasurable
from letheon.eval.checks import Floats, Numbers, classes, vector
from letheon.eval.membership.sides import attack_sides, matched_logits
from letheon.eval.membership.signals import gather_signal, margin
from letheon.eval.metrics.registry import metric

if TYPE_CHECKING:
    from letheon.eval.case import Case


class Roc(NamedTuple):
    """One point for "nobody" and one for each distinct score, from the largest down."""

    fpr: Floats  # (t,) share of non-members called members, increasing
    tpr: Floats  # (t,) share of members called members, increasing
    threshold: Floats  # (t,) called a member at or above this score; +inf first


def roc(members: Numbers, others: Numbers) -> Roc:
    """Compute the ROC curve of scores of `members` (m,) against `others` (n,), non-members.

    Raises:
        NotMeasurable: no score on a side.
        RunFailed: scores that are not finite.
    """
    inside = np.sort(vector(members, "scores of members"))
    outside = np.sort(vector(others, "scores of non-members"))
    values = np.unique(np.concatenate([inside, outside]))[::-1]
    tpr = (len(inside) - np.searchsorted(inside, values, side="left")) / len(inside)
    fpr = (len(outside) - np.searchsorted(outside, values, side="left")) / len(outside)
    start = np.zeros(1)
    return Roc(
        np.concatenate([start, fpr]),
        np.concatenate([start, tpr]),
        np.concatenate([np.full(1, np.inf), values]),
    )


def auc(members: Numbers, others: Numbers) -> float:
    """Compute the probability that a member scores above a non-member, ties half; 0.5 is chance."""
    inside = vector(members, "scores of members")
    outside = np.sort(vector(others, "scores of non-members"))
    below = np.searchsorted(outside, inside, side="left")
    not_above = np.searchsorted(outside, inside, side="right")
    return float((below + not_above).mean() / (2 * len(outside)))


def tpr_at_fpr(members: Numbers, others: Numbers, fpr: float) -> float:
    """Find the largest true-positive rate at a false-positive rate of at most `fpr`.

    With n non-members the false-positive rate moves in steps of 1/n: below n = 1/`fpr` this is
    the rate at no false positive at all.
    """
    if not 0 <= fpr <= 1:
        raise InputError(f"got a false-positive rate of {fpr}; expected a share from 0 to 1")
    curve = roc(members, others)
    return float(curve.tpr[curve.fpr <= fpr].max())


def threshold_at_fpr(others: Numbers, fpr: float) -> float:
    """Find the smallest score at or above which lies at most a share `fpr` of non-members.

    The share of members at or above it is `tpr_at_fpr`.
    """
    outside = np.sort(vector(others, "scores of non-members"))[::-1]
    allowed = int(np.floor(fpr * len(outside) + 1e-9))
    if allowed == len(outside):
        return -np.inf
    return float(np.nextafter(outside[allowed], np.inf))


class Attack(NamedTuple):
    """How well a score tells members from non-members."""

    auc: float
    tpr_at_1pct: float
    tpr_at_01pct: float
    within_class_auc: float  # mean over classes of that class's own AUC, weighted by its members
    members: int
    others: int  # 1/others is the smallest step of the false-positive rate


def class_matched(
    forget: Numbers, forget_labels: Numbers, held_out: Numbers, held_out_labels: Numbers
) -> Attack:
    """Attack forget samples against held-out samples of the same classes only.

    In class-wise forgetting an attack against all held-out samples separates the classes, not the
    members; matched non-members leave membership as the only difference. The pooled AUC and rates
    still move where the two sides mix the classes in other proportions; `within_class_auc` does
    not.

    Args:
        forget: (m,) scores of the forget set, larger for members.
        forget_labels: (m,) their classes.
        held_out: (n,) scores of samples never trained on, of any class.
        held_out_labels: (n,) their classes; those that are no forget class are left out.

    Raises:
        NotMeasurable: a forget class without held-out samples.
        RunFailed: scores that are not finite.
    """
    inside = vector(forget, "forget scores")
    outside = vector(held_out, "held-out scores")
    inside_class = classes(forget_labels, "forget labels", len(inside))
    outside_class = classes(held_out_labels, "held-out labels", len(outside))
    wanted, counts = np.unique(inside_class, return_counts=True)
    missing = [str(c) for c in wanted if not (outside_class == c).any()]
    if missing:
        raise NotMeasurable(
            f"got no held-out samples of forget class {', '.join(missing)}; expected at least one "
            "each; give the test set, or leave the class out on both sides"
        )
    matched = np.isin(outside_class, wanted)
    others = outside[matched]
    own = [auc(inside[inside_class == c], outside[outside_class == c]) for c in wanted]
    return Attack(
        auc=auc(inside, others),
        tpr_at_1pct=tpr_at_fpr(inside, others, 0.01),
        tpr_at_01pct=tpr_at_fpr(inside, others, 0.001),
        within_class_auc=float(np.average(own, weights=counts)),
        members=len(inside),
        others=len(others),
    )


_GROUP = "Membership inference"


def _attack(case: Case) -> Attack:
    """`class_matched` on the true-class margin."""
    sides, of_forget = case.once(attack_sides), matched_logits(case, case.passes)
    labels = of_forget.gather(of_forget.labels)
    scores = (gather_signal(side, margin) for side in (of_forget, case.test))
    return class_matched(next(scores), labels, next(scores), sides.labels)


@metric(
    "mia_auc", title="AUC, class-matched", group=_GROUP, unit="share", better="50 %",
    needs=("test", "depth full"), everywhere=True, place=8,
)  # fmt: skip
def mia_auc(case: Case) -> float:
    """Area under the ROC curve of the true-class margin, forget images against held-out images of
    the same classes; ties count half.
    """
    return case.once(_attack).auc


@metric(
    "mia_within_class_auc", title="AUC within classes", group=_GROUP, unit="share", better="50 %",
    needs=("test", "depth full"), everywhere=True, place=9,
)  # fmt: skip
def mia_within_class_auc(case: Case) -> float:
    """Mean over the forgotten classes of the AUC within the class, weighted by its images."""
    return case.once(_attack).within_class_auc


@metric(
    "mia_tpr_1pct", title="TPR at 1 % FPR", group=_GROUP, unit="share", better="low",
    needs=("test", "depth full"), everywhere=True, source="Carlini et al. 2022", place=10,
)  # fmt: skip
def mia_tpr_1pct(case: Case) -> float:
    """Largest share of forget images found with at most 1 % of the held-out images of the same
    classes called members; no interpolation.
    """
    return case.once(_attack).tpr_at_1pct


@metric(
    "mia_tpr_01pct", title="TPR at 0.1 % FPR", group=_GROUP, unit="share", better="low",
    needs=("test", "depth full"), everywhere=True, source="Carlini et al. 2022", place=11,
)  # fmt: skip
def mia_tpr_01pct(case: Case) -> float:
    """Largest share of forget images found with at most 0.1 % of the held-out images of the same
    classes called members; with fewer than 1,000 of them this is at no false positive.
    """
    return case.once(_attack).tpr_at_01pct
