"""Linear probes: what a classifier fitted to frozen features still tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from letheon.errors import InputError, NotMeasurable
from letheon.eval.checks import Ints, Numbers, classes, matrix
from letheon.eval.metrics.registry import metric
from letheon.kernels.keyed import hash_keys

if TYPE_CHECKING:
    from letheon.eval.case import Case

SHOTS = 5
"""Training images of each class in the few-shot probe."""
PROBED = 50_000
"""Training images of the linear probe, about, at most; beyond, as many of each class."""
_RIDGE_FROM = 2_000_000  # training images x classes


class Probe(NamedTuple):
    """Held-out accuracy of a classifier fitted to frozen features; shares in [0, 1]."""

    forgotten: float  # over held-out samples of the forgotten classes: their recovery
    retained: float | None  # over the others; None where there are none
    per_class: dict[int, float]  # classes with held-out samples


def few_shot(labels: Ints, shots: int, seed: int) -> NDArray[np.int64]:
    """Positions of `shots` samples of each class, increasing; all of a class that has fewer.

    Which ones depends on (seed, position) only.
    """
    position = torch.arange(len(labels))
    keys = hash_keys(seed, "few-shot", 0, position, 1)[:, 0].numpy()
    order = np.lexsort((keys, labels))
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(first, counts)
    return np.sort(order[place < shots])


def linear_probe(
    train: Numbers,
    train_labels: Numbers,
    test: Numbers,
    test_labels: Numbers,
    forgotten: Numbers,
    *,
    solver: Literal["logistic", "ridge"] = "logistic",
    shots: int | None = None,
    seed: int = 0,
) -> Probe:
    """Fit a linear classifier to frozen features of all classes, forgotten ones among them.

    An encoder that has forgotten a class no more than its head has gives it back here. Compare
    `forgotten` with the retrained model's, whose features may separate a class never seen.
    Features are centered and scaled by the training features; a constant one is left at zero.

    Args:
        train: (n, D) features of training samples, forget set included.
        train_labels: (n,) their classes.
        test: (m, D) features of held-out samples.
        test_labels: (m,) their classes.
        forgotten: (k,) class numbers.
        solver: multinomial logistic regression, or one-against-all ridge regression, which stays
            affordable for many classes and samples.
        shots: samples of each class to train with; None takes all.
        seed: of the few-shot choice.

    Raises:
        InputError: shapes that do not fit.
        NotMeasurable: a single training class, or no forgotten class among the training or the
            held-out samples.
        RunFailed: NaN.
    """
    inside, outside = matrix(train, "training features"), matrix(test, "held-out features")
    known = classes(train_labels, "training labels", len(inside))
    truth = classes(test_labels, "held-out labels", len(outside))
    gone = classes(forgotten, "forgotten classes")
    if inside.shape[1] != outside.shape[1]:
        raise InputError(
            f"got features of widths {inside.shape[1]} and {outside.shape[1]}; expected one width"
        )
    if shots is not None:
        sample = few_shot(known, shots, seed)
        inside, known = inside[sample], known[sample]
    of_forgotten = np.isin(truth, gone)
    if len(np.unique(known)) < 2 or not np.isin(known, gone).any() or not of_forgotten.any():
        raise NotMeasurable(
            "got no forgotten class on a side of the probe, or a single class to train with; "
            "expected training and held-out samples of forgotten and of other classes"
        )
    mean, spread = inside.mean(axis=0), inside.std(axis=0)
    spread[spread <= 1e-12 * (1 + np.abs(mean))] = np.inf
    fitted = (LogisticRegression(max_iter=2000) if solver == "logistic" else RidgeClassifier()).fit(
        (inside - mean) / spread, known
    )
    right: NDArray[np.bool_] = fitted.predict((outside - mean) / spread) == truth
    return Probe(
        forgotten=float(right[of_forgotten].mean()),
        retained=float(right[~of_forgotten].mean()) if (~of_forgotten).any() else None,
        per_class={int(c): float(right[truth == c].mean()) for c in np.unique(truth)},
    )


_GROUP = "Representation and probes"


def _probe(case: Case, shots: int | None) -> Probe:
    train, test, names = case.train, case.test, case.peers.names
    used = min(len(train), PROBED) * len(names)
    return linear_probe(
        train.features, train.labels, test.features, test.labels,
        torch.tensor(case.peers.forgotten, dtype=torch.int64), shots=shots,
        solver="ridge" if used >= _RIDGE_FROM else "logistic", seed=0,
    )  # fmt: skip


def _whole(case: Case) -> Probe:
    few = len(case.train) <= PROBED
    return _probe(case, None if few else max(1, PROBED // len(case.peers.names)))


@metric(
    "probe_forgotten", title="Probe: forgotten", group=_GROUP, unit="share",
    better="as retrained", needs=("whole classes", "depth full"), reads=_whole, place=4,
)  # fmt: skip
def probe_forgotten(case: Case) -> float:
    """Held-out accuracy on the forgotten classes of a linear classifier trained on the frozen
    features of all classes.
    """
    return case.once(_whole).forgotten


@metric(
    "probe_retained", title="Probe: retained", group=_GROUP, unit="share",
    better="as retrained", needs=("whole classes", "depth full"), reads=_whole, place=5,
)  # fmt: skip
def probe_retained(case: Case) -> float:
    """Held-out accuracy on the other classes of a linear classifier trained on the frozen features
    of all classes.
    """
    retained = case.once(_whole).retained
    if retained is None:
        raise NotMeasurable("got no test image of another class; expected at least one")
    return retained


@metric(
    "probe_few_shot", title="Few-shot probe", group=_GROUP, unit="share",
    better="as retrained", needs=("whole classes", "depth full"), place=6,
)  # fmt: skip
def probe_few_shot(case: Case) -> float:
    """Held-out accuracy on the forgotten classes of a linear classifier trained on the frozen
    features of a few training images a class.
    """
    return _probe(case, SHOTS).forgotten
