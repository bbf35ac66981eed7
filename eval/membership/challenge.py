"""The forgetting-quality score of the NeurIPS 2023 machine unlearning challenge.

Triantafillou et al. 2024 ("Are we making progress in unlearning?"), written from its released
evaluation code's definition. It needs many models of each kind; the challenge had 512.
"""

from __future__ import annotations

import numpy as np
import torch

from letheon.errors import InputError, NotMeasurable
from letheon.eval.checks import Floats, Numbers, matrix, vector
from letheon.eval.inference.sampling import sample_rows
from letheon.eval.membership.over_seeds import SeveralRuns
from letheon.eval.metrics.registry import metric

_DELTA = 1e-5
_CAP = 50.0
_PER_UNIT = 100  # thresholds per unit of margin
_BUFFER = 2.0  # how far interval ends reach beyond the narrower distribution
_BUCKET = 0.5
_PEAKED = 0.01  # ranges below this ratio count as perfectly separated


def _share(sorted_values: Floats, low: Floats, high: Floats) -> Floats:
    """Share of the values within [low, high], for each threshold pair."""
    below = np.searchsorted(sorted_values, low, side="left")
    within = np.searchsorted(sorted_values, high, side="right") - below
    return np.maximum(within, 0) / len(sorted_values)


def _intervals(narrow: Floats) -> tuple[Floats, Floats]:
    """Ends of the double thresholds around the narrower distribution, on the released grid."""
    low, high = narrow[0], narrow[-1]
    width = high - low
    start, stop = low + width - _BUFFER, high + _BUFFER
    right = np.linspace(start, stop, int(np.ceil((stop - start) * _PER_UNIT)))
    steps = np.linspace(-_BUFFER, _BUFFER, int(np.ceil(2 * _BUFFER * _PER_UNIT)))
    left = right[:, None] - width + steps
    return left.ravel(), np.repeat(right, len(steps))


def _largest(fpr: Floats, fnr: Floats) -> float:
    """Find the largest epsilon that any threshold shows; 0 where none is fit to show one."""
    if ((fpr == 0) & (fnr == 0)).any():
        return _CAP
    # A threshold with exactly one rate of zero is dropped: too few models to say how small it is.
    usable = (fpr > 0) & (fnr > 0)
    fpr, fnr = fpr[usable], fnr[usable]
    with np.errstate(divide="ignore", invalid="ignore"):
        both = np.stack(
            [np.log(1 - _DELTA - fpr) - np.log(fnr), np.log(1 - _DELTA - fnr) - np.log(fpr)]
        )
    both = both[~np.isnan(both)]
    return float(np.clip(both.max(), 0, _CAP)) if both.size else 0.0


def epsilon(unlearned: Numbers, retrained: Numbers) -> float:
    """Compute how well one sample's margins separate unlearned and retrained models, in nats.

    The maximum over single thresholds (the side with the larger median is above) and intervals
    (the narrower distribution is inside) of max(log(1 - delta - FPR) - log FNR,
    log(1 - delta - FNR) - log FPR), delta = 1e-5, between 0 and 50; 50 where some threshold makes
    no mistake, or where one distribution's range is under 1 % of the other's.

    Args:
        unlearned: (K,) margins of the sample (`signals.margin`).
        retrained: (L,) the same under retrained models.
    """
    u, r = np.sort(vector(unlearned, "margins")), np.sort(vector(retrained, "margins"))
    upper, lower = (r, u) if np.median(r) > np.median(u) else (u, r)
    upper_is_wide = upper[-1] - upper[0] >= lower[-1] - lower[0]
    narrow, wide = (lower, upper) if upper_is_wide else (upper, lower)
    if narrow[-1] - narrow[0] < _PEAKED * (wide[-1] - wide[0]):
        return _CAP
    inside = _intervals(narrow)
    low, high = min(u[0], r[0]), max(u[-1], r[-1])
    above = np.linspace(low, high, int(np.ceil((high - low) * _PER_UNIT)))
    over = (above, np.full(len(above), np.inf))
    fpr = np.concatenate([_share(wide, *inside), _share(lower, *over)])
    fnr = 1 - np.concatenate([_share(narrow, *inside), _share(upper, *over)])
    return _largest(fpr, fnr)


def forgetting_quality(unlearned: Numbers, retrained: Numbers) -> float:
    """F: the mean over forget samples of 2^-floor(epsilon / 0.5), in [0, 1]; 1 is ideal.

    A sample whose epsilon lies beyond the last bucket, which ends at ceil(log(K - 1)), scores 0:
    K models cannot show more.

    Args:
        unlearned: (K, n) margins of the forget samples under K unlearned models.
        retrained: (L, n) the same under L retrained models.

    Raises:
        NotMeasurable: fewer than three models of a kind.
        InputError: different samples.
        RunFailed: NaN or infinity.
    """
    u, r = matrix(unlearned, "unlearned margins", 3), matrix(retrained, "retrained margins", 3)
    if u.shape[1] != r.shape[1]:
        raise InputError(
            f"got margins of {u.shape[1]} and {r.shape[1]} samples; expected the same samples"
        )
    last = np.ceil(np.log(len(u) - 1))
    score = [0.5 ** np.floor(e / _BUCKET) if e < last else 0.0 for e in map(epsilon, u.T, r.T)]
    return float(np.mean(score))


def challenge_score(
    quality: float,
    retain: tuple[float, float],
    test: tuple[float, float],
) -> float:
    """Multiply F by the ratios of retain and test accuracy, (unlearned, retrained) each.

    Raises:
        NotMeasurable: a retrained model that is never right.
    """
    if min(retain[1], test[1]) <= 0:
        raise NotMeasurable(
            "got a retrained accuracy of 0; expected a model that is sometimes right"
        )
    return quality * (retain[0] / retain[1]) * (test[0] / test[1])


_GROUP = "Membership inference"
_SAMPLED = 200  # forget images at most, by key, for it takes 0.1 s an image


def _quality(runs: SeveralRuns) -> float:
    unlearned, retrained = runs.margins
    some = sample_rows(torch.ones(unlearned.shape[1], dtype=torch.bool), _SAMPLED)
    return forgetting_quality(unlearned[:, some], retrained[:, some])


@metric(
    "challenge_quality", title="Challenge quality F", group=_GROUP, better="high", stage="runs",
    needs=("several runs", "depth full"), source="NeurIPS 2023 challenge", place=17,
)  # fmt: skip
def challenge_quality(runs: SeveralRuns) -> float:
    """Mean over forget images of 2^-floor(epsilon / 0.5), epsilon the largest that an attack on
    many unlearned and retrained models shows.
    """
    return runs.once(_quality)


@metric(
    "challenge_score", title="Challenge score", group=_GROUP, better="high", stage="runs",
    needs=("several runs", "depth full"), source="NeurIPS 2023 challenge", place=18,
)  # fmt: skip
def challenge_score_of_runs(runs: SeveralRuns) -> float:
    """F times RA and TRA (means over the runs), each over the retrained models'."""
    retain, test = (
        (runs.unlearned.accuracy(key), runs.retrained.accuracy(key)) for key in ("RA", "TRA")
    )
    return challenge_score(runs.once(_quality), retain, test)
