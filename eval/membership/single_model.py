"""Membership inference on one model: three attacks that the field all calls "MIA", by own names.

Attacks that need several models are in `many_models`; the per-sample signals they read are in
`signals`; curves and class-matched attacks are in `roc`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import InputError, NotMeasurable
from letheon.eval.checks import Floats, Numbers, matrix, vector
from letheon.eval.membership.sides import attack_sides, forget_logits, matched_logits, select_logits
from letheon.eval.membership.signals import SIGNALS, entropy, gather_signal, loss, probabilities
from letheon.eval.metrics.registry import Part, metric
from letheon.kernels.keyed import permutation

if TYPE_CHECKING:
    from letheon.eval.case import Case


CAP = 5_000
"""Samples of a side that SVC-efficacy reads, at most; the cost grows with its square."""


def _sample_places(n: int, count: int, seed: int, stream: str) -> Tensor:
    """`count` of n positions, increasing; which ones depends on (seed, stream, n) only."""
    if count >= n:
        return torch.arange(n)
    return permutation(seed, stream, 0, n)[:count].sort().values


def _sample_rows(rows: Floats, count: int, seed: int, stream: str) -> Floats:
    """`count` of `rows`, in their order."""
    return rows[_sample_places(len(rows), count, seed, stream).numpy()]


def _two_sides(members: Floats, others: Floats) -> tuple[Floats, NDArray[Any]]:
    """Rows of both sides and their truth, 1 for a member."""
    truth = np.concatenate([np.ones(len(members), np.int64), np.zeros(len(others), np.int64)])
    return np.concatenate([members, others]), truth


def svc_efficacy(
    retain: Numbers, test: Numbers, forget: Numbers, *, cap: int = CAP, seed: int = 0
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
    from sklearn.svm import SVC  # here: a second to import

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
    from sklearn.linear_model import LogisticRegression  # here: a second to import

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
    if size < 2:
        raise NotMeasurable(f"got {size} samples on a side; expected at least 2, to learn and ask")
    if not 2 <= folds <= size:
        raise NotMeasurable(
            f"got {folds} folds for {size} samples a side; expected from 2 to {size}"
        )
    inside = _sample_rows(inside, size, seed, "two-sample forget")
    outside = _sample_rows(outside, size, seed, "two-sample held-out")
    rows, truth = _two_sides(inside[:, None], outside[:, None])
    from sklearn.linear_model import LogisticRegression  # here: a second to import
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    divide = StratifiedKFold(folds, shuffle=True, random_state=seed)
    attack = LogisticRegression(max_iter=1000)
    return float(cross_val_score(attack, rows, truth, cv=divide, scoring="accuracy").mean())


_GROUP = "Membership inference"
_FORMS = {
    "_published": Part(
        " (published)",
        "As published: where whole classes are forgotten, only test images of the other classes "
        "are non-members.",
    )
}
_STREAMS = {"retain": "svc members", "test": "svc others", "forget": "svc forget"}
PROBABILITIES = "probabilities"


def _svc_inputs(case: Case) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """Form -> feature -> (n, d) of retain, test and forget images, on every rank.

    Of the probabilities, which are one row a sample, only those are gathered that the attack reads.
    """
    sides, train, test = case.once(attack_sides), case.train, case.test
    parts = {"retain": (train, sides.retain), "forget": (train, sides.members)}
    of = {side: select_logits(outputs, rows) for side, (outputs, rows) in parts.items()}
    of["test"] = test
    values = {
        name: {side: gather_signal(each, signal)[:, None] for side, each in of.items()}
        for name, signal in SIGNALS.items()
    }
    kept = ~torch.isin(sides.labels, torch.tensor(case.peers.forgotten, dtype=torch.int64))
    forms = {"": torch.ones_like(kept)} | ({} if bool(kept.all()) else {"_published": kept})
    inputs: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    for form, asked in forms.items():
        inputs[form] = {
            name: (each["retain"], each["test"][asked], each["forget"])
            for name, each in values.items()
        }
        rows = {side: torch.arange(each.span()[1]) for side, each in of.items()}
        rows["test"] = asked.nonzero()[:, 0]
        size = min(len(rows["retain"]), len(rows["test"]), CAP)
        tables = []
        for side, stream in _STREAMS.items():
            count = CAP if side == "forget" else size
            places = rows[side][_sample_places(len(rows[side]), count, 0, stream)]
            tables.append(of[side].gather(of[side].logits[of[side].local_rows(places)]))
        inputs[form][PROBABILITIES] = tuple(tables)
    return inputs


def _svc(case: Case, feature: str) -> dict[str, float | NotMeasurable]:
    """Compute SVC-efficacy on a feature in both forms; they are one where no class is forgotten."""
    inputs = case.once(_svc_inputs)
    values: dict[str, float | NotMeasurable] = {}
    for form, by_name in inputs.items():
        sides: Sequence[Tensor] = by_name[feature]
        if feature == PROBABILITIES:
            sides = [probabilities(side) for side in sides]
        try:
            values[form] = svc_efficacy(*sides)
        except NotMeasurable as error:
            values[form] = error
    return {"_published": values[""], **values}


@metric(
    "svc_efficacy_confidence", title="SVC-efficacy (confidence)", group=_GROUP, unit="share",
    better="as retrained", needs=("test", "depth full"), gathers=_svc_inputs, parts=_FORMS,
    source="Jia et al. 2023", place=1,
)  # fmt: skip
def svc_confidence(case: Case) -> dict[str, float | NotMeasurable]:
    """Share of the forget set that a support vector classifier (RBF, C = 3), trained with retain
    images as members and test images as non-members on the probability of the true class, calls
    non-members. What papers call MIA. For whole classes about 100 % whatever was forgotten.
    """
    return _svc(case, "confidence")


@metric(
    "svc_efficacy_entropy", title="SVC-efficacy (entropy)", group=_GROUP, unit="share",
    better="as retrained", needs=("test", "depth full"), gathers=_svc_inputs, parts=_FORMS,
    source="Jia et al. 2023", place=2,
)  # fmt: skip
def svc_entropy(case: Case) -> dict[str, float | NotMeasurable]:
    """The attack of SVC-efficacy on the entropy of the prediction."""
    return _svc(case, "entropy")


@metric(
    "svc_efficacy_correctness", title="SVC-efficacy (correctness)", group=_GROUP, unit="share",
    better="as retrained", needs=("test", "depth full"), gathers=_svc_inputs, parts=_FORMS,
    source="Jia et al. 2023", place=3,
)  # fmt: skip
def svc_correctness(case: Case) -> dict[str, float | NotMeasurable]:
    """The attack of SVC-efficacy on whether the prediction is right."""
    return _svc(case, "correctness")


@metric(
    "svc_efficacy_modified_entropy", title="SVC-efficacy (mod. entropy)", group=_GROUP,
    unit="share", better="as retrained", needs=("test", "depth full"), gathers=_svc_inputs,
    parts=_FORMS, source="Song and Mittal 2021", place=4,
)  # fmt: skip
def svc_modified_entropy(case: Case) -> dict[str, float | NotMeasurable]:
    """The attack of SVC-efficacy on -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i), by
    definition; released code computes something else.
    """
    return _svc(case, "modified entropy")


@metric(
    "svc_efficacy_probabilities", title="SVC-efficacy (probabilities)", group=_GROUP, unit="share",
    better="as retrained", needs=("test", "depth full"), gathers=_svc_inputs, parts=_FORMS,
    source="Jia et al. 2023", place=5,
)  # fmt: skip
def svc_probabilities(case: Case) -> dict[str, float | NotMeasurable]:
    """The attack of SVC-efficacy on the whole vector of probabilities."""
    return _svc(case, "probabilities")


def _entropies(case: Case) -> list[Tensor]:
    """(n,) entropies of retain, test and forget images."""
    retain = select_logits(case.train, case.once(attack_sides).retain)
    parts = (retain, case.test, forget_logits(case, case.passes))
    return [gather_signal(side, entropy) for side in parts]


@metric(
    "lr_entropy", title="LR-entropy", group=_GROUP, unit="share", better="as retrained",
    needs=("test", "depth full"), gathers=_entropies, source="Chundawat et al. 2023", place=6,
)  # fmt: skip
def lr_entropy_of_model(case: Case) -> float:
    """Share of the forget set that a balanced logistic regression on entropy, trained on retain
    against test images, calls members; note the opposite direction to SVC-efficacy.
    """
    return lr_entropy(*case.once(_entropies))


def _losses(case: Case) -> tuple[Tensor, Tensor]:
    """(n,) losses of the forget images and of held-out images of their classes."""
    held_out = case.once(attack_sides).held_out
    inside = gather_signal(matched_logits(case, case.passes), loss)
    return inside, gather_signal(case.test, loss)[held_out]


@metric(
    "loss_two_sample", title="Loss two-sample", group=_GROUP, unit="share", better="50 %",
    needs=("test", "depth full"), gathers=_losses, source="Kurmanji et al. 2023", place=7,
)  # fmt: skip
def loss_two_sample_of_model(case: Case) -> float:
    """Cross-validated accuracy of a logistic regression that tells forget images from held-out
    images of the same classes by their loss.
    """
    inside, outside = case.once(_losses)
    folds = min(10, len(inside), len(outside))
    return loss_two_sample(inside, outside, folds=folds, seed=0)
