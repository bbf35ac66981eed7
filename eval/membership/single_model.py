"""Membership inference on one model: three attacks that the field all calls "MIA", by own names.

Attacks that need several models are in `many_models`; the per-sample signals they read are in
`signals`; curves and class-matched attacks are in `roc`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC
from torch import Tensor

from letheon.errors import InputError, NotMeasurable
from letheon.eval.checks import Floats, Numbers, matrix, vector
from letheon.eval.membership.sides import attack_sides
from letheon.eval.membership.signals import entropy, features, loss
from letheon.eval.metrics.registry import metric
from letheon.kernels.keyed import permutation

if TYPE_CHECKING:
    from letheon.eval.case import Case


def _sample_rows(rows: Floats, count: int, seed: int, stream: str) -> Floats:
    """`count` of `rows`, in their order; which ones depends on (seed, stream, len(rows)) only."""
    if count >= len(rows):
        return rows
    sample = permutation(seed, stream, 0, len(rows))[:count].sort().values
    return rows[sample.numpy()]


def _two_sides(members: Floats, others: Floats) -> tuple[Floats, NDArray[Any]]:
    """Rows of both sides and their truth, 1 for a member."""
    truth = np.concatenate([np.ones(len(members), np.int64), np.zeros(len(others), np.int64)])
    return np.concatenate([members, others]), truth


def svc_efficacy(
    retain: Numbers, test: Numbers, forget: Numbers, *, cap: int = 5_000, seed: int = 0
) -> float:
    """SVC-efficacy: the share of the forget set that the attack judges *not* a member.

    Jia et al. 2023 ("Model Sparsity Can Simplify Machine Unlearning"), as released: a support
    vector classifier, RBF kernel, C = 3, gamma 'auto', trained with a part of the retain training
    set as members and the test set as non-members, both of the same size. Compare with the
    retrained model's value: for whole classes that is about 1 for any model that does not
    recognise them, so a high value by itself shows nothing.

    Departures: the published code takes the first |test| retain rows, which are a few classes
    where the file is ordered by class; here they are drawn by `seed`. No side exceeds `cap`: its
    ImageNet variant takes 10,000 (half a minute a feature where the sides overlap). With 5,000
    forget samples the share is known to 0.7 points (one standard error) at worst.

    Args:
        retain: (n, d) features of retain training samples, d = 1 or the number of classes.
        test: (m, d) features of held-out samples.
        forget: (k, d) features of the forget training set.
        cap: samples of retain, test and forget each, at most; the cost grows with its square.
        seed: of the subsamples.

    Raises:
        InputError: tables of different widths.
        RunFailed: NaN or infinity.
    """
    inside, outside = matrix(retain, "retain features"), matrix(test, "test features")
    rows = matrix(forget, "forget features")
    if not inside.shape[1] == outside.shape[1] == rows.shape[1]:
        raise InputError(
            f"got features of widths {inside.shape[1]}, {outside.shape[1]} and {rows.shape[1]} "
            "for retain, test and forget; expected the same width"
        )
    size = min(len(inside), len(outside), cap)
    members = _sample_rows(inside, size, seed, "svc members")
    others = _sample_rows(outside, size, seed, "svc others")
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(*_two_sides(members, others))
    return float(1 - np.mean(attack.predict(_sample_rows(rows, cap, seed, "svc forget"))))


def svc_efficacies(
    retain: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    forget: tuple[Tensor, Tensor],
) -> dict[str, float]:
    """SVC-efficacy on each of the five published features, by name.

    Papers that print one "MIA" print the value for confidence. Each argument is (logits (n, C),
    labels (n,)) of one set. Modified entropy is by definition, not as the released code has it.
    """
    sides = [features(*side) for side in (retain, test, forget)]
    return {name: svc_efficacy(*(side[name] for side in sides)) for name in sides[0]}


def lr_entropy(retain: Numbers, test: Numbers, forget: Numbers) -> float:
    """LR-entropy: the share of the forget set that the attack judges a *member*.

    Chundawat et al. 2023 ("Can Bad Teaching Induce Forgetting?"), also SSD, LoTUS and others: a
    logistic regression with balanced class weights on prediction entropy, trained with the retain
    training set (members) against the test set. Low, or equal to the retrained model's, is
    better; note that SVC-efficacy counts the opposite.

    Args:
        retain: (n,) entropies of retain training samples.
        test: (m,) entropies of held-out samples.
        forget: (k,) entropies of the forget training set.
    """
    inside, outside = vector(retain, "retain entropies"), vector(test, "test entropies")
    rows, truth = _two_sides(inside[:, None], outside[:, None])
    attack = LogisticRegression(class_weight="balanced", max_iter=1000).fit(rows, truth)
    return float(np.mean(attack.predict(vector(forget, "forget entropies")[:, None])))


def loss_two_sample(
    forget: Numbers,
    held_out: Numbers,
    *,
    folds: int = 10,
    seed: int = 0,
) -> float:
    """Loss two-sample: cross-validated accuracy of telling forget from held-out by the loss.

    The attack of the NeurIPS 2023 challenge's starting kit and of SCRUB (Kurmanji et al. 2023): a
    logistic regression on the per-sample loss. Give held-out samples of the forget classes, in
    the forget classes' proportions. 0.5 is ideal, provided both sides have the same size: the
    larger is drawn down by `seed`.

    Args:
        forget: (n,) losses of the forget training set.
        held_out: (m,) losses of samples of the same classes never trained on.
        folds: of the cross-validation; at most the size of the smaller side.
        seed: of the draw and the folds.

    Raises:
        NotMeasurable: fewer than two folds, or fewer samples than folds.
    """
    inside, outside = vector(forget, "forget losses"), vector(held_out, "held-out losses")
    size = min(len(inside), len(outside))
    if not 2 <= folds <= size:
        raise NotMeasurable(
            f"got {folds} folds for {size} samples a side; expected from 2 to {size}"
        )
    inside = _sample_rows(inside, size, seed, "two-sample forget")
    outside = _sample_rows(outside, size, seed, "two-sample held-out")
    rows, truth = _two_sides(inside[:, None], outside[:, None])
    divide = StratifiedKFold(folds, shuffle=True, random_state=seed)
    attack = LogisticRegression(max_iter=1000)
    return float(cross_val_score(attack, rows, truth, cv=divide, scoring="accuracy").mean())


_GROUP = "Membership inference"


def _svc(case: Case) -> dict[str, float]:
    """`svc_efficacies` of the model; non-members are all test images, as published."""
    sides = case.once(attack_sides)
    parts = (sides.retain, sides.test, sides.forget)
    return svc_efficacies(*((side.logits, side.labels) for side in parts))


@metric(
    "svc_efficacy_confidence", title="SVC-efficacy (confidence)", group=_GROUP, unit="share",
    better="as retrained", needs=("depth full",), reads=_svc, source="Jia et al. 2023", place=1,
)  # fmt: skip
def svc_confidence(case: Case) -> float:
    """Share of the forget set that a support vector classifier (RBF, C = 3), trained with retain
    images as members and test images as non-members on the probability of the true class, calls
    non-members. What papers call MIA. For whole classes about 100 % whatever was forgotten.
    """
    return case.once(_svc)["confidence"]


@metric(
    "svc_efficacy_entropy", title="SVC-efficacy (entropy)", group=_GROUP, unit="share",
    better="as retrained", needs=("depth full",), reads=_svc, source="Jia et al. 2023", place=2,
)  # fmt: skip
def svc_entropy(case: Case) -> float:
    """The attack of SVC-efficacy on the entropy of the prediction."""
    return case.once(_svc)["entropy"]


@metric(
    "svc_efficacy_correctness", title="SVC-efficacy (correctness)", group=_GROUP, unit="share",
    better="as retrained", needs=("depth full",), reads=_svc, source="Jia et al. 2023", place=3,
)  # fmt: skip
def svc_correctness(case: Case) -> float:
    """The attack of SVC-efficacy on whether the prediction is right."""
    return case.once(_svc)["correctness"]


@metric(
    "svc_efficacy_modified_entropy", title="SVC-efficacy (mod. entropy)", group=_GROUP,
    unit="share", better="as retrained", needs=("depth full",), reads=_svc,
    source="Song and Mittal 2021", place=4,
)  # fmt: skip
def svc_modified_entropy(case: Case) -> float:
    """The attack of SVC-efficacy on -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i), by
    definition; released code computes something else.
    """
    return case.once(_svc)["modified entropy"]


@metric(
    "svc_efficacy_probabilities", title="SVC-efficacy (probabilities)", group=_GROUP, unit="share",
    better="as retrained", needs=("depth full",), reads=_svc, source="Jia et al. 2023", place=5,
)  # fmt: skip
def svc_probabilities(case: Case) -> float:
    """The attack of SVC-efficacy on the whole vector of probabilities."""
    return case.once(_svc)["probabilities"]


@metric(
    "lr_entropy", title="LR-entropy", group=_GROUP, unit="share", better="as retrained",
    needs=("depth full",), source="Chundawat et al. 2023", place=6,
)  # fmt: skip
def lr_entropy_of_model(case: Case) -> float:
    """Share of the forget set that a balanced logistic regression on entropy, trained on retain
    against test images, calls members; note the opposite direction to SVC-efficacy.
    """
    sides = case.once(attack_sides)
    parts = (sides.retain, sides.test, sides.forget)
    return lr_entropy(*(entropy(side.logits, side.labels) for side in parts))


@metric(
    "loss_two_sample", title="Loss two-sample", group=_GROUP, unit="share", better="50 %",
    needs=("depth full",), source="Kurmanji et al. 2023", place=7,
)  # fmt: skip
def loss_two_sample_of_model(case: Case) -> float:
    """Cross-validated accuracy of a logistic regression that tells forget images from held-out
    images of the same classes by their loss.
    """
    sides = case.once(attack_sides)
    held = sides.test.where(sides.held_out)
    inside, outside = (loss(side.logits, side.labels) for side in (sides.forget, held))
    folds = min(10, len(inside), len(outside))
    return loss_two_sample(inside, outside, folds=folds, seed=0)
