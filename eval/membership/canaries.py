"""Recall of canaries: images under a planted wrong label, whose memory is known without a retrain.

A planted label is drawn evenly among the wrong ones. Whatever a model answers that never learned
the canaries, its answers do not depend on that draw, so its recall is known in advance: that is the
null hypothesis here, and no retrained model is needed to test it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from letheon.errors import NotMeasurable
from letheon.eval.checks import Numbers, matrix
from letheon.eval.metrics.registry import SHARE, metric
from letheon.loaders.forget_request import RANKED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from letheon.eval.case import Case

LEAST = 10
"""Canaries below which no p-value is given."""
EXACT = 4000
"""Canaries times wrong labels up to which the p-value is exact."""


class Recall(NamedTuple):
    """How much a model remembers of canaries."""

    recovery: float  # share named by the planted label
    chance: float  # what that share is expected to be for a model that never saw them
    rank: float  # mean share of the other wrong labels that lie below the planted one
    p: float  # one-sided, of that mean for a model that never saw them


def recall(logits: Numbers, labels: NDArray[np.int64], true_labels: NDArray[np.int64]) -> Recall:
    """Measure how well the planted labels are remembered, and what a forgetful model would give.

    A model that never saw the canaries names the planted label with odds 1 / (C - 1) where it does
    not name the true one: `chance`. Its planted label is as likely as any other wrong label at each
    rank: given the logits, the sum of the ranks is that of one even draw among the C - 1 in each
    row, and p is how likely such a sum is to be as large. Its level holds: it is at most 0.05 in
    at most 5 % of all draws.

    Args:
        logits: (n, C) answers to the canaries.
        labels: (n,) wrong labels they were trained under.
        true_labels: (n,) classes they show.

    Raises:
        NotMeasurable: no canary, or two classes, of which one is wrong.
    """
    if not len(labels):
        raise NotMeasurable("none of the canaries was to be forgotten")
    answers = matrix(logits, "logits of canaries")
    count, classes = answers.shape
    if classes < 3:
        raise NotMeasurable("got two classes: a wrong label of two is no draw")
    rows = np.arange(count)
    named = answers.argmax(axis=1)
    missed = float(np.mean(named != true_labels))
    wrong = np.delete(answers.ravel(), rows * classes + true_labels).reshape(count, classes - 1)
    places = np.stack([_places(row) for row in wrong])  # of mean (C - 2) / 2 in each row
    own = places[rows, labels - (labels > true_labels)]
    rank = float((own / (classes - 2)).mean())
    p = _upper_tail(places, float(own.sum()))
    return Recall(float(np.mean(named == labels)), missed / (classes - 1), rank, p)


def _upper_tail(places: NDArray[np.float64], total: float) -> float:
    """Compute how likely a sum of one place a row, each drawn evenly, is to reach `total`.

    Up to `EXACT` places by the distribution itself, beyond by a normal one of its mean and
    variance, with half a step of a rank for what lies on `total`.

    Args:
        places: (n, C - 1) multiples of a half.
        total: a sum that can be drawn.
    """
    if places.size > EXACT:
        deviation = math.sqrt(float(places.var(axis=1).sum()))
        excess = total - 0.5 - float(places.mean(axis=1).sum())
        return 0.5 * math.erfc(excess / deviation / math.sqrt(2)) if deviation else 1.0
    odds = np.ones(1)  # of each sum of halves, from 0
    for halves in (2 * places).astype(np.int64):
        odds = np.convolve(odds, np.bincount(halves) / len(halves))
    return min(float(odds[round(2 * total) :].sum()), 1.0)


def _places(row: NDArray[Any]) -> NDArray[np.float64]:
    """(n,) how many of the other entries each one exceeds; equal ones count half."""
    ordered = np.sort(row)
    low, high = (np.searchsorted(ordered, row, side) for side in ("left", "right"))
    return low + (high - low - 1) / 2


def _gather(case: Case) -> tuple[Any, Any, Any, Any]:
    """Gather logits, planted and true labels of all canaries, and which are to be forgotten."""
    known = case.peers.canaries
    train = case.train
    at = np.isin(train.index.numpy(), list(known))
    true = np.array([known[int(number)] for number in train.index[at]], dtype=np.int64)
    parts = (train.logits[at], train.labels[at], torch.from_numpy(true), train.forget[at])
    logits, planted, truth, forget = (train.gather(part).numpy() for part in parts)
    return logits, planted, truth, forget


def _recall(case: Case) -> Recall:
    logits, planted, true, forget = case.once(_gather)
    return recall(logits[forget], planted[forget], true[forget])


def _expect_draw(case: Case) -> None:
    """Check that which canaries are to be forgotten does not depend on the draw of their labels.

    Raises:
        NotMeasurable: they come first in a ranking by the original: by its loss on the planted
            labels, or by its confidence, which is what it learned under them.
    """
    if case.peers.request.partition(":")[0] in RANKED:
        raise NotMeasurable(
            "the request was ranked by the planted labels, or by a model that learned them: what "
            "chance gives is not known; name classes, or draw samples"
        )


_GROUP = "Canaries"


@metric(
    "canary_recovery", title="Canaries recovered", group=_GROUP, unit="share",
    better="as retrained", needs=("canaries",), gathers=_gather, reads=_recall, place=1,
)  # fmt: skip
def canary_recovery(case: Case) -> float:
    """Share of the forgotten canaries (training images under a planted wrong label) that the model
    still names by the planted label. Nobody can guess a planted label: what lies above chance was
    not forgotten, whatever a retrained model would say.
    """
    return case.once(_recall).recovery


@metric(
    "canary_chance", title="Canaries by chance", group=_GROUP, unit="share",
    needs=("canaries",), gathers=_gather, reads=_recall, place=2,
)  # fmt: skip
def canary_chance(case: Case) -> float:
    """Share of the forgotten canaries that a model with these answers would name by the planted
    label if it had never seen them: of those not named by their true class, one in all wrong
    labels. Not of a request that the original ranked (hardest, easiest), as the rank and its p.
    """
    _expect_draw(case)
    return case.once(_recall).chance


@metric(
    "canary_rank", title="Rank of planted labels", group=_GROUP, unit="share", better="50 %",
    needs=("canaries",), gathers=_gather, reads=_recall, place=3,
    source="after Carlini et al. 2019, 'The Secret Sharer' (exposure)",
)  # fmt: skip
def canary_rank(case: Case) -> float:
    """Mean share of the other wrong labels that the model finds less likely than the planted one,
    over the forgotten canaries: 50 % where they were never seen, 100 % where each is remembered,
    even if it is not named.
    """
    _expect_draw(case)
    return case.once(_recall).rank


@metric(
    "canary_p", title="p of that rank", group=_GROUP, needs=("canaries",), gathers=_gather,
    reads=_recall, place=4,
    source="exact over the draw of the labels; of more than 4000 wrong ones, normal",
)  # fmt: skip
def canary_p(case: Case) -> float:
    """One-sided p-value of the rank of the planted labels, were the canaries never seen; needs no
    retrained model, and 10 canaries.
    """
    _expect_draw(case)
    count = int(case.once(_gather)[3].sum())
    if count < LEAST:
        raise NotMeasurable(f"got {count} canaries; not decidable from fewer than {LEAST}")
    return case.once(_recall).p


@metric(
    "canaries", title="Canaries", group=_GROUP, unit="table", needs=("canaries",), gathers=_gather,
    reads=_recall, place=5,
    schema={
        "type": "object",
        "properties": {
            "forget": {"type": "integer", "minimum": 0},
            "retain": {"type": "integer", "minimum": 0},
            "retain_recovery": SHARE,
        },
    },
)  # fmt: skip
def canary_counts(case: Case) -> dict[str, float | int | None]:
    """How many canaries are among the images to be forgotten and to be kept, and the share of the
    kept ones that are named by their planted label.
    """
    logits, planted, _, forget = case.once(_gather)
    kept = logits[~forget].argmax(axis=1) == planted[~forget]
    return {
        "forget": int(forget.sum()),
        "retain": len(kept),
        "retain_recovery": float(kept.mean()) if len(kept) else None,
    }
