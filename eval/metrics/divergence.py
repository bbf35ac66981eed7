"""How far two models' output distributions lie apart on the same samples.

All take logits (n, C) of this rank, work in float64 in parts of the rows, and use natural
logarithms; means are over the samples of all ranks, which must all call.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, sum_over_ranks
from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.inference.passes import Passes
from letheon.eval.metrics.registry import metric

if TYPE_CHECKING:
    from letheon.eval.case import Case

_ROWS = 8192  # rows in float64 at a time


def _by_rows(first: Tensor, second: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(n,) float64: `of` applied to matching parts of both log-probability tables."""
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] == 0:
        raise InputError(
            f"got logits of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected two "
            "tables samples x classes of the same shape"
        )
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise RunFailed(
            "got logits with NaN or infinity; expected finite numbers; a model diverged"
        )
    parts = zip(first.split(_ROWS), second.split(_ROWS), strict=True)
    return torch.cat([of(a.double().log_softmax(1), b.double().log_softmax(1)) for a, b in parts])


def js_rows(first: Tensor, second: Tensor) -> Tensor:
    """(n,) Jensen-Shannon divergence of each sample in nats, in [0, log 2], symmetric."""

    def of(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
        left = (log_p.exp() * (log_p - log_m)).sum(1)
        right = (log_q.exp() * (log_q - log_m)).sum(1)
        return ((left + right) / 2).clamp(min=0.0)  # rounding, where both are equal

    return _by_rows(first, second, of)


def _mean(values: Tensor, ranks: Ranks | None) -> float:
    """Average over the samples of all ranks."""
    total = torch.stack([values.sum(), values.new_tensor(len(values))])
    sum_over_ranks([total], ranks or Ranks())
    if int(total[1]) == 0:
        raise NotMeasurable("got no samples; expected at least one")
    return float(total[0] / total[1])


def js(first: Tensor, second: Tensor, ranks: Ranks | None = None) -> float:
    """Mean over samples of JS(p || q) = KL(p || m)/2 + KL(q || m)/2, m = (p + q)/2; at most log 2.

    KL is summed over the classes and averaged over the samples. Released code of Bad-T and SSD
    averages over the classes too, which divides by C and makes values of different data sets
    incomparable; that is not offered.
    """
    return _mean(js_rows(first, second), ranks)


def zrf(unlearned: Tensor, random_network: Tensor, ranks: Ranks | None = None) -> float:
    """Zero-retrain forgetting: 1 - JS to an untrained network, on the forget set.

    Chundawat et al. 2023, with JS in nats as in `js`, so the value lies in [1 - log 2, 1]. High
    where the model is as ignorant as the untrained one; compare with the retrained model's value.
    """
    return 1 - js(unlearned, random_network, ranks)


def activation_distance(first: Tensor, second: Tensor, ranks: Ranks | None = None) -> float:
    """Mean over samples of the Euclidean distance of both softmax vectors, at most sqrt 2.

    Golatkar et al. 2021 and Chundawat et al. 2023; usually against the retrained model, on the
    forget and the retain set apart.
    """
    return _mean(_by_rows(first, second, lambda p, q: (p.exp() - q.exp()).norm(dim=1)), ranks)


def completeness(first: Tensor, second: Tensor, ranks: Ranks | None = None) -> float:
    """Share of samples for which both models name the same class; 1 is full agreement.

    Usually against the retrained model. Of equal largest logits the first counts.
    """
    agree = _by_rows(first, second, lambda p, q: (p.argmax(1) == q.argmax(1)).double())
    return _mean(agree, ranks)


def _to_retrained(
    case: Case, of: Callable[[Tensor, Tensor, Ranks | None], float], on: str
) -> float:
    """Mean over the retrained models of a divergence to them."""
    own, ranks = _logits(case.passes, on), case.train.ranks
    return fmean(of(own, _logits(other.passes, on), ranks) for other in case.others)


def _logits(passes: Passes, on: str) -> Tensor:
    """(n, C) logits on the "forget" training images or on the "test" set."""
    train = passes.outputs["train"]
    return train.logits[train.forget] if on == "forget" else passes.outputs["test"].logits


@metric(
    "js", title="JS divergence", group="Output distributions", unit="nats", better="low",
    needs=("retrained", "depth full"), everywhere=True, place=1,
)  # fmt: skip
def js_to_retrained(case: Case) -> float:
    """Jensen-Shannon divergence to the retrained model's predictions on the forget set, natural
    logarithm, mean over images; at most log 2 = 0.693; of several retrained models the mean.
    """
    return _to_retrained(case, js, "forget")


@metric(
    "activation_distance", title="Activation distance", group="Output distributions", better="low",
    needs=("retrained", "depth full"), everywhere=True, source="Golatkar et al. 2021",
    place=2,
)  # fmt: skip
def activation_distance_to_retrained(case: Case) -> float:
    """Mean Euclidean distance of the softmax vectors to the retrained model's on the forget set."""
    return _to_retrained(case, activation_distance, "forget")


@metric(
    "zrf", title="ZRF", group="Output distributions", better="as retrained",
    needs=("untrained", "depth full"), everywhere=True, source="Chundawat et al. 2023",
    place=3,
)  # fmt: skip
def zrf_to_untrained(case: Case) -> float:
    """1 - JS divergence to an untrained network's predictions on the forget set, in nats."""
    sides = _logits(case.passes, "forget"), _logits(case.untrained, "forget")
    return zrf(*sides, case.train.ranks)


@metric(
    "completeness", title="Completeness", group="Output distributions", unit="share",
    better="as retrained", needs=("retrained", "test", "depth full"), everywhere=True, place=4,
)  # fmt: skip
def completeness_to_retrained(case: Case) -> float:
    """Share of held-out images for which the model and the retrained model name the same class;
    retrained models agree with one another on less than all.
    """
    return _to_retrained(case, completeness, "test")
