"""The three-sample comparison: are a model's answers nearer the retrained models or the original?

Two-sample tests accuse exact retrains, because two trainings never answer alike. The relative
question of three samples (Bounliphone et al. 2016; for unlearning arXiv 2601.19755) has an answer
for them too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from letheon.errors import NotMeasurable
from letheon.eval.checks import Floats, Numbers, matrix, vector
from letheon.eval.membership.over_seeds import LEAST, SeveralRuns
from letheon.eval.metrics.registry import metric

IMAGES = 10
"""Forget images below which the sign test decides nothing at 1 %."""


class Closeness(NamedTuple):
    """On which side of the middle a model's answers to the forget images lie."""

    share: float  # of the images whose answer is nearer a retrained model than an original
    p: float  # two-sided, of the hypothesis that neither side is nearer


def closeness(model: Numbers, original: Numbers, retrained: Numbers) -> Closeness:
    """Compare per-image distances of a model to the originals and to the retrained models.

    Of every pair of one original and one retrained model, an image tells whose margin lies nearer
    the audited model's; it speaks for the side that is nearer in more pairs. The sign test
    (binomial, exact) over the images gives the p-value. Images of as many pairs on either side
    count half in the share and not in the test. The images are the sample, the models are given:
    another original may decide otherwise.

    Pairs, not means of either side: the mean of K models is nearer to any other model than a single
    one is. By means, 77 % of other originals and 66 % of true retrained models were called closer
    to 20 retrained models than to one original, at p < 0.05, where 100 digits were forgotten; by
    pairs at most 4 % are called closer to either side, on these digits.

    The test takes for granted that originals and retrained models spread alike. Where they do not,
    models of the side that spreads more are nearer to the other: with 0.7 of the spread in the
    originals and a small shift, most true retrained models are called closer to the original, the
    more the more images there are. Compare a share with those of true models
    (`eval.audit.conditions.describe_answers`).

    Args:
        model: (n,) margins of the forget images under the audited model.
        original: (M, n) under the original models.
        retrained: (K, n) under the retrained models.

    Raises:
        NotMeasurable: fewer than `IMAGES` images.
        InputError: shapes that are none of these.
    """
    ours = vector(model, "margins")
    before = np.abs(ours - matrix(original, "original margins"))
    after = np.abs(ours - matrix(retrained, "retrained margins"))
    if len(ours) < IMAGES:
        raise NotMeasurable(
            f"got {len(ours)} forget images; not decidable from fewer than {IMAGES}"
        )
    evidence = sum(np.sign(each - after).sum(axis=0) for each in before)
    near, decided = int((evidence > 0).sum()), int((evidence != 0).sum())
    share = (near + (len(evidence) - decided) / 2) / len(evidence)
    from scipy.stats import binomtest  # slow to import

    return Closeness(share, float(binomtest(near, decided).pvalue) if decided else 1.0)


def relative_distance(model: Numbers, retrained: Numbers) -> float:
    """Distance of a model's margins to the retrained models', over that of these to one another.

    Root mean square over the images of the margin less the mean over K retrained models, divided
    by sqrt(1 + 1 / K), so that one more retrained model has the same expectation for any K; then
    by the root mean square of the same of each retrained model and the K - 1 others. A retrained
    model gives about 1.

    Args:
        model: (n,) margins of the forget images under the audited model.
        retrained: (K, n) under the retrained models.

    Raises:
        NotMeasurable: fewer than three retrained models, or all of them answer alike.
    """
    ours, after = vector(model, "margins"), matrix(retrained, "retrained margins", LEAST)

    def square(one: Floats, others: Floats) -> float:
        away = one - others.mean(axis=0)
        return float(np.mean(away**2) / (1 + 1 / len(others)))

    own = np.mean([square(one, np.delete(after, k, axis=0)) for k, one in enumerate(after)])
    if not own > 0:
        raise NotMeasurable("got retrained models that answer alike; expected other seeds")
    return float(np.sqrt(square(ours, after) / own))


def _closeness(runs: SeveralRuns) -> Closeness:
    if not runs.original or runs.own is None:
        raise NotMeasurable("got no original model; expected one to compare with")
    if len(runs.retrained.margins) < LEAST:
        raise NotMeasurable(
            f"got {len(runs.retrained.margins)} retrained models besides this one; not decidable "
            f"from fewer than {LEAST}"
        )
    return closeness(
        runs.own, torch.stack([*runs.original]), torch.stack([*runs.retrained.margins])
    )


_GROUP = "Distance to the retrained models"


@metric(
    "closer_to_retrained", title="Images nearer retrained", group=_GROUP, unit="share",
    better="high", stage="runs", needs=("several runs", "depth full"), place=10,
    source="after Bounliphone et al. 2016 and arXiv 2601.19755",
)  # fmt: skip
def closer_to_retrained(runs: SeveralRuns) -> float:
    """Share of the forget images whose margin lies nearer a retrained model's than an original's in
    more than half of all pairs of one of each: 0 as if nothing was done, near 1 for a retrained
    model where whole classes are forgotten, about 50 % where the two sides answer alike. It names a
    side, not a distance: the answers of a model that was destroyed lie on some side, too. Read it
    beside TRA and the distance of the margins.
    """
    return runs.once(_closeness).share


@metric(
    "closer_p", title="p of nearer", group=_GROUP, stage="runs",
    needs=("several runs", "depth full"), place=11, source="exact sign test",
)  # fmt: skip
def closer_p(runs: SeveralRuns) -> float:
    """Two-sided p-value of the sign test over the forget images that the model is as near to the
    original as to the retrained models; small where it is nearer one of them, on either side.
    """
    return runs.once(_closeness).p


@metric(
    "margin_distance", title="Margins to retrained", group=_GROUP, better="1", stage="runs",
    needs=("several runs", "depth full"), place=12,
    source="ours: the leave-one-out spread as unit",
)  # fmt: skip
def margin_distance(runs: SeveralRuns) -> float:
    """Distance of the forget images' margins to the mean of the retrained models, in units of the
    retrained models' own distance from one another: 1 for a retrained model, more for whatever
    answers in another way, on either side.
    """
    retrained = runs.retrained.margins
    if runs.own is None or len(retrained) < LEAST:
        raise NotMeasurable(
            f"got {len(retrained)} retrained models besides this one; their spread needs {LEAST}"
        )
    return relative_distance(runs.own, torch.stack([*retrained]))
