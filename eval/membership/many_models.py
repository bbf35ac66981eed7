"""Attacks and distances that need more than one model: RMIA, U-LiRA, KLOM.

Here rows are models and columns are samples: (K, n).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from letheon.errors import InputError, NotMeasurable
from letheon.eval.checks import Floats, Numbers, matrix, vector
from letheon.eval.inference.passes import Passes
from letheon.eval.membership.over_seeds import SeveralRuns
from letheon.eval.membership.roc import auc, tpr_at_fpr
from letheon.eval.membership.sides import attack_sides, matched_logits
from letheon.eval.membership.signals import gather_signal, log_confidence
from letheon.eval.metrics.registry import metric

if TYPE_CHECKING:
    from letheon.eval.case import Case


def _same_samples(first: Floats, second: Floats, names: str) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise InputError(
            f"got {names} for {first.shape[-1]} and {second.shape[-1]} samples; "
            "expected the same samples in the same order"
        )


def rmia(
    target: Numbers,
    references: Numbers,
    population: Numbers,
    population_references: Numbers,
    *,
    gamma: float = 1.0,
    offline_a: float = 0.3,
) -> Floats:
    """(n,) RMIA score of each sample, a share in [0, 1], larger for members.

    Zarifzadeh, Liu and Shokri 2024 ("Low-Cost High-Power Membership Inference Attacks"): the share
    of population samples z with [p(x|model) / p(x)] / [p(z|model) / p(z)] >= gamma, where p is the
    probability of the true label. p(x) comes from the reference models, ((1 + a) mean + 1 - a) / 2,
    which corrects the mean for references that never saw x (the paper's offline form; a = 0.3 is
    its value for CIFAR-10). Models retrained without the forget set are such references; one to
    four are enough. With a = 1 the mean is taken as it is, as for references half of which saw x.
    Score the held-out samples in the same way and compare both with `class_matched`.

    Args:
        target: (n,) log p(y|x) of the audited model on the samples asked about.
        references: (K, n) the same of the K reference models.
        population: (m,) log p(y|z) of the audited model on samples that no model saw, best not
            those asked about.
        population_references: (K, m) the same of the reference models.
        gamma: the ratio that counts as dominated.
        offline_a: a, from 0 to 1.

    Raises:
        InputError: shapes that do not fit, a or gamma out of range.
        RunFailed: values that are not finite.
    """
    if not (0 <= offline_a <= 1 and gamma > 0):
        raise InputError(
            f"got offline_a {offline_a} and gamma {gamma}; expected a from 0 to 1 and gamma above 0"
        )
    from scipy.special import logsumexp  # here: half a second to import

    x, z = vector(target, "target log-probabilities"), vector(population, "population")
    x_ref = matrix(references, "reference log-probabilities")
    z_ref = matrix(population_references, "reference log-probabilities of the population")
    _same_samples(x, x_ref, "target and references")
    _same_samples(z, z_ref, "population and its references")
    if len(x_ref) != len(z_ref):
        raise InputError(
            f"got {len(x_ref)} reference models for the samples and {len(z_ref)} for the "
            "population; expected the same models"
        )

    def log_ratio(model: Floats, reference: Floats) -> Floats:
        mean = logsumexp(reference, axis=0) - np.log(len(reference))
        with np.errstate(divide="ignore"):
            rest = np.log((1 - offline_a) / 2)
        return np.asarray(model - np.logaddexp(np.log((1 + offline_a) / 2) + mean, rest))

    ordered = np.sort(log_ratio(z, z_ref))
    dominated = np.searchsorted(ordered, log_ratio(x, x_ref) - np.log(gamma), side="right")
    return dominated / len(ordered)


class ULira(NamedTuple):
    """How well models that unlearned a sample are told from models that never saw it."""

    accuracy: float  # balanced over both kinds of model; 0.5 is ideal
    auc: float
    tpr_at_1pct: float
    tpr_at_01pct: float
    per_sample: Floats  # (n,) balanced accuracy on each sample


def log_density(value: Floats, models: Floats) -> Floats:
    """(n,) log density of (n,) margins under a Gaussian fitted to each column of (K, n) models."""
    from scipy.stats import norm  # here: half a second to import

    spread = np.maximum(models.std(axis=0), 1e-6)  # equal margins still have a likelihood
    return np.asarray(norm.logpdf(value, models.mean(axis=0), spread))


def u_lira(unlearned: Numbers, retrained: Numbers) -> ULira:
    """U-LiRA, the per-sample attack of Hayes et al. 2024 (arXiv 2403.01218).

    For each sample a Gaussian is fitted to its margins under the models that trained on it and
    then unlearned it, another to those under the models retrained without it, and the likelihood
    ratio decides which kind an audited model is. Every model is audited in turn, with its own
    value left out of the fit of its kind.

    Args:
        unlearned: (K, n) margins (`signals.margin`) under unlearned models, K >= 3.
        retrained: (L, n) the same under retrained models, L >= 3.

    Raises:
        NotMeasurable: fewer than three models of a kind.
        InputError: different samples.
        RunFailed: NaN or infinity.
    """
    u, r = matrix(unlearned, "unlearned margins", 3), matrix(retrained, "retrained margins", 3)
    _same_samples(u, r, "unlearned and retrained margins")
    of_unlearned = np.stack(
        [log_density(v, np.delete(u, k, 0)) - log_density(v, r) for k, v in enumerate(u)]
    )  # (K, n) log-likelihood ratios
    of_retrained = np.stack(
        [log_density(v, u) - log_density(v, np.delete(r, k, 0)) for k, v in enumerate(r)]
    )  # (L, n)
    hits = (of_unlearned > 0).mean(axis=0)
    rejections = (of_retrained <= 0).mean(axis=0)
    per_sample = (hits + rejections) / 2
    flat_u, flat_r = of_unlearned.ravel(), of_retrained.ravel()
    return ULira(
        accuracy=float(per_sample.mean()),
        auc=auc(flat_u, flat_r),
        tpr_at_1pct=tpr_at_fpr(flat_u, flat_r, 0.01),
        tpr_at_01pct=tpr_at_fpr(flat_u, flat_r, 0.001),
        per_sample=per_sample,
    )


def klom(
    unlearned: Numbers,
    oracles: Numbers,
    *,
    bins: int = 20,
    clip: float = 100.0,
    floor: float = 1e-5,
) -> Floats:
    """(n,) KLOM of each sample in nats: KL(margins over unlearned || over retrained models).

    Georgiev, Rinberg et al. 2024 (arXiv 2410.23232) and Rinberg et al. 2025: margins clipped to
    +-`clip`, histograms over `bins` equal bins spanning both samples, the retrained share raised
    to `floor` in the bins that the unlearned models use, then both made to sum to one. Report the
    mean and the 95th percentile over forget, retain and held-out samples; the paper uses 100
    models of each kind.

    Args:
        unlearned: (K, n) margins under unlearned models.
        oracles: (L, n) margins under models retrained without the forget set.
        bins: of the shared histogram.
        clip: bound on the margins.
        floor: smallest share of a bin in the second argument of the divergence.

    Raises:
        InputError: different samples.
        RunFailed: NaN or infinity.
    """
    u = matrix(unlearned, "unlearned margins").clip(-clip, clip)
    o = matrix(oracles, "retrained margins").clip(-clip, clip)
    _same_samples(u, o, "unlearned and retrained margins")
    result = np.empty(u.shape[1])
    for sample, (of_u, of_o) in enumerate(zip(u.T, o.T, strict=True)):
        low, high = min(of_u.min(), of_o.min()), max(of_u.max(), of_o.max())
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
        p, q = (np.histogram(values, edges)[0].astype(float) for values in (of_u, of_o))
        p /= max(p.sum(), 1)
        q /= max(q.sum(), 1)
        used = p > 0
        q = np.where(used, np.maximum(q, floor), q)
        result[sample] = np.sum(p[used] * np.log(p[used] / q[used])) + np.log(max(q.sum(), floor))
    return result


_GROUP = "Membership inference"
REFERENCES = 4
"""Retrained models that RMIA reads, at most."""


def _rmia(case: Case) -> tuple[Floats, Floats]:
    """RMIA scores of the forget images and of held-out images of their classes."""
    sides = case.once(attack_sides)
    asked = sides.held_out & ~sides.population
    if not bool(asked.any() and sides.population.any()):
        raise NotMeasurable(
            f"got {int(sides.held_out.sum())} held-out images of the forgotten classes; expected "
            "at least 2: one to ask about and one of the population it is compared with"
        )

    def parts(passes: Passes) -> list[Tensor]:
        inside = gather_signal(matched_logits(case, passes), log_confidence)
        test = gather_signal(passes.outputs["test"], log_confidence)
        return [inside, test[asked], test[sides.population]]

    ours = parts(case.passes)
    references = [parts(other.passes) for other in case.others[:REFERENCES]]
    inside, outside, others = (torch.stack(values) for values in zip(*references, strict=True))
    published = {"gamma": 1.0, "offline_a": 0.3}
    return (
        rmia(ours[0], inside, ours[2], others, **published),
        rmia(ours[1], outside, ours[2], others, **published),
    )


@metric(
    "rmia_auc", title="RMIA AUC", group=_GROUP, unit="share", better="50 %",
    needs=("retrained", "test", "depth full"), everywhere=True,
    source="Zarifzadeh et al. 2024", place=12,
)  # fmt: skip
def rmia_auc(case: Case) -> float:
    """AUC of the RMIA score, the share of population images z for which the likelihood ratio of x
    to z reaches gamma, with 1 to 4 reference models; half of the held-out images of the forgotten
    classes are the population, the others are asked about.
    """
    return auc(*case.once(_rmia))


@metric(
    "rmia_tpr_1pct", title="RMIA TPR at 1 % FPR", group=_GROUP, unit="share", better="low",
    needs=("retrained", "test", "depth full"), everywhere=True,
    source="Zarifzadeh et al. 2024", place=13,
)  # fmt: skip
def rmia_tpr_1pct(case: Case) -> float:
    """Largest true-positive rate of the RMIA score at no more than 1 % false positives."""
    return tpr_at_fpr(*case.once(_rmia), 0.01)


@metric(
    "u_lira", title="U-LiRA", group=_GROUP, unit="share", better="50 %", stage="runs",
    needs=("several runs", "depth full"), source="Hayes et al. 2024", place=14,
)  # fmt: skip
def u_lira_of_runs(runs: SeveralRuns) -> float:
    """Balanced accuracy of the per-image likelihood-ratio test between models that unlearned an
    image and models that never saw it.
    """
    return u_lira(*runs.margins).accuracy


def _klom(runs: SeveralRuns) -> Floats:
    return klom(*runs.margins)


@metric(
    "klom_mean", title="KLOM, mean", group=_GROUP, unit="nats", better="low", stage="runs",
    needs=("several runs", "depth full"), source="Rinberg et al. 2025", place=15,
)  # fmt: skip
def klom_mean(runs: SeveralRuns) -> float:
    """Mean over forget images of the divergence between the margins of unlearned and of retrained
    models, 20 bins.
    """
    return float(runs.once(_klom).mean())


@metric(
    "klom_p95", title="KLOM, 95th percentile", group=_GROUP, unit="nats", better="low",
    stage="runs", needs=("several runs", "depth full"), source="Rinberg et al. 2025", place=16,
)  # fmt: skip
def klom_p95(runs: SeveralRuns) -> float:
    """The 95th percentile over forget images of the divergence between the margins of unlearned
    and of retrained models, 20 bins.
    """
    return float(np.percentile(runs.once(_klom), 95))
