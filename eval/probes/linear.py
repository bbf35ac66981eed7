"""Linear probes: what a classifier fitted to frozen features still tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows, sum_over_ranks
from letheon.errors import InputError, NotMeasurable
from letheon.eval.checks import Ints, Numbers, classes
from letheon.eval.metrics.registry import metric
from letheon.eval.probes.linear_fit import fit_logistic, fit_ridge, fit_scale
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


def few_shot(labels: Ints, shots: int) -> NDArray[np.int64]:
    """Positions of `shots` samples of each class, increasing; all of a class that has fewer.

    Which ones depends on the position only.
    """
    position = torch.arange(len(labels))
    keys = hash_keys(0, "few-shot", 0, position, 1)[:, 0].numpy()
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
    ranks: Ranks | None = None,
) -> Probe:
    """Fit a linear classifier to frozen features of all classes, forgotten ones among them.

    An encoder that has forgotten a class no more than its head has gives it back here. Compare
    `forgotten` with the retrained model's, whose features may separate a class never seen.
    Features are centered and scaled by the training features; a constant one is left at zero.

    Args:
        train: (n, D) features of this rank's training samples, forget set included.
        train_labels: (n,) their classes.
        test: (m, D) features of this rank's held-out samples.
        test_labels: (m,) their classes.
        forgotten: (k,) class numbers.
        solver: multinomial logistic regression, or one-against-all ridge regression, which stays
            affordable for many classes and samples.
        shots: samples of each class to train with; None takes all.
        ranks: the job; each fits to its own samples, and gradients or moments are summed.

    Raises:
        InputError: shapes that do not fit.
        NotMeasurable: a single training class, or no forgotten class among the training or the
            held-out samples.
        RunFailed: NaN.
    """
    ranks = ranks or Ranks()
    inside, outside = _table(train, "training features"), _table(test, "held-out features")
    known = classes(train_labels, "training labels", len(inside))
    truth = classes(test_labels, "held-out labels", len(outside))
    gone = classes(forgotten, "forgotten classes")
    if inside.shape[1] != outside.shape[1]:
        raise InputError(
            f"got features of widths {inside.shape[1]} and {outside.shape[1]}; expected one width"
        )
    if shots is not None:
        before = int(gather_rows(torch.tensor([len(known)]), ranks)[: ranks.rank].sum())
        sample = few_shot(_over_ranks(known, ranks), shots) - before
        sample = sample[(sample >= 0) & (sample < len(known))]
        inside, known = inside[torch.from_numpy(sample)], known[sample]
    wanted, asked = (np.unique(_over_ranks(labels, ranks)) for labels in (known, truth))
    if len(wanted) < 2 or not np.isin(wanted, gone).any() or not np.isin(asked, gone).any():
        raise NotMeasurable(
            "got no forgotten class on a side of the probe, or a single class to train with; "
            "expected training and held-out samples of forgotten and of other classes"
        )
    scaled = fit_scale(inside, ranks)
    fit = fit_logistic if solver == "logistic" else fit_ridge
    columns = torch.from_numpy(np.searchsorted(wanted, known))
    weights = fit(scaled, columns, len(wanted), ranks)
    said = [wanted[scores.argmax(dim=1).numpy()] for scores in scaled.over(outside).scores(weights)]
    right = np.concatenate([np.zeros(0, np.int64), *said]) == truth
    table = torch.zeros(2, int(asked[-1]) + 1, dtype=torch.int64)
    for line, rows in enumerate((truth[right], truth)):
        table[line] = torch.bincount(torch.from_numpy(rows), minlength=table.shape[1])
    sum_over_ranks([table], ranks)
    counts = {int(c): tuple(table[:, int(c)].tolist()) for c in asked}

    def share(of_forgotten: bool) -> float | None:
        pairs = [pair for c, pair in counts.items() if (c in set(gone.tolist())) == of_forgotten]
        return sum(r for r, _ in pairs) / sum(n for _, n in pairs) if pairs else None

    recovered = share(True)
    assert recovered is not None, "there are held-out samples of a forgotten class"
    return Probe(recovered, share(False), {c: r / n for c, (r, n) in counts.items()})


def _table(values: Numbers, name: str) -> Tensor:
    """(n, D) on the host, as it is in memory."""
    table = torch.as_tensor(values).detach().cpu()
    if table.ndim != 2 or table.shape[1] < 1:
        raise InputError(
            f"got {name} of shape {tuple(table.shape)}; expected a table of at least 1 columns"
        )
    return table


def _over_ranks(labels: Ints, ranks: Ranks) -> Ints:
    """(n,) labels of all ranks."""
    return np.asarray(gather_rows(torch.from_numpy(labels), ranks).numpy())


_GROUP = "Representation and probes"


def _probe(case: Case, shots: int | None) -> Probe:
    train, test, names = case.true_train, case.test, case.peers.names
    used = min(train.span()[1], PROBED) * len(names)
    return linear_probe(
        train.features, train.labels, test.features, test.labels,
        torch.tensor(case.peers.forgotten, dtype=torch.int64), shots=shots,
        solver="ridge" if used >= _RIDGE_FROM else "logistic", ranks=train.ranks,
    )  # fmt: skip


def _whole(case: Case) -> Probe:
    few = case.train.span()[1] <= PROBED
    return _probe(case, None if few else max(1, PROBED // len(case.peers.names)))


@metric(
    "probe_forgotten", title="Probe: forgotten", group=_GROUP, unit="share",
    better="as retrained", needs=("whole classes", "test", "depth full"), everywhere=True, place=4,
)  # fmt: skip
def probe_forgotten(case: Case) -> float:
    """Held-out accuracy on the forgotten classes of a linear classifier trained on the frozen
    features of all classes.
    """
    return case.once(_whole).forgotten


@metric(
    "probe_retained", title="Probe: retained", group=_GROUP, unit="share",
    better="as retrained", needs=("whole classes", "test", "depth full"), everywhere=True, place=5,
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
    better="as retrained", needs=("whole classes", "test", "depth full"), everywhere=True, place=6,
)  # fmt: skip
def probe_few_shot(case: Case) -> float:
    """Held-out accuracy on the forgotten classes of a linear classifier trained on the frozen
    features of a few training images a class.
    """
    return _probe(case, SHOTS).forgotten
