"""How far a model's weights lie from another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from letheon.errors import NotMeasurable
from letheon.eval.metrics.registry import NUMBERS_BY_NAME, metric

if TYPE_CHECKING:
    from letheon.eval.case import Case, Subject


def weight_distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Tensor -> Euclidean distance of two state dicts' floating-point tensors, in float64.

    Two networks that compute the same may lie far apart (their units can be permuted), so this
    compares runs from one initialization only.

    Raises:
        NotMeasurable: other names or shapes; the text lists the names.
    """
    odd = sorted(set(first) ^ set(second))
    odd += [n for n in first if n in second and first[n].shape != second[n].shape]
    if odd:
        raise NotMeasurable(
            f"got state dicts that differ in {', '.join(odd[:8])}; expected one architecture"
        )
    return {
        name: float((values.detach().double().cpu() - second[name].detach().double().cpu()).norm())
        for name, values in first.items()
        if values.is_floating_point()
    }


def _distances(case: Case, others: Sequence[Subject]) -> tuple[float, dict[str, float]]:
    """Relative distance of all weights, and distance of each tensor, to the mean over `others`."""
    own = _weights(case.subject)
    by_tensor, whole = zip(*(_distance(own, other) for other in others), strict=True)
    return fmean(whole), {name: fmean(each[name] for each in by_tensor) for name in own}


def _distance(own: Mapping[str, Tensor], other: Subject) -> tuple[dict[str, float], float]:
    """Distance of each tensor, and of all relative to the other's; its network is let go."""
    weights = _weights(other)
    distances = weight_distance(own, weights)
    size = torch.stack([p.detach().double().norm() for p in weights.values()]).norm()
    length = torch.tensor(list(distances.values())).double().norm()
    return distances, float(length / size)


def _weights(of: Subject) -> dict[str, Tensor]:
    if of.network is None:
        raise NotMeasurable("got outputs without their model; expected its weights")
    return dict(of.network().named_parameters())


def _to_original(case: Case) -> tuple[float, dict[str, float]]:
    return _distances(case, [case.original])


def _to_retrained(case: Case) -> tuple[float, dict[str, float]]:
    return _distances(case, case.others)


@metric(
    "weight_distance_original", title="Weights to original", group="Weights",
    needs=("original", "depth full"), reads=_to_original, place=1,
)  # fmt: skip
def weights_to_original(case: Case) -> float:
    """Euclidean distance of all parameters to the original model's, over their norm: how far a
    method moved.
    """
    return case.once(_to_original)[0]


@metric(
    "weight_distance_retrained", title="Weights to retrained", group="Weights",
    needs=("retrained", "depth full"), reads=_to_retrained, place=2,
)  # fmt: skip
def weights_to_retrained(case: Case) -> float:
    """Euclidean distance of all parameters to the retrained models', over their norm, mean.
    Networks from other initializations are far apart even where they compute the same.
    """
    return case.once(_to_retrained)[0]


@metric(
    "weight_distance_original_by_layer", title="Weights to original by tensor", group="Weights",
    unit="table", needs=("original", "depth full"), reads=_to_original, place=3,
    schema=NUMBERS_BY_NAME,
)  # fmt: skip
def weights_to_original_by_layer(case: Case) -> dict[str, Any]:
    """Euclidean distance of each parameter to the original model's."""
    return case.once(_to_original)[1]


@metric(
    "weight_distance_retrained_by_layer", title="Weights to retrained by tensor", group="Weights",
    unit="table", needs=("retrained", "depth full"), reads=_to_retrained, place=4,
    schema=NUMBERS_BY_NAME,
)  # fmt: skip
def weights_to_retrained_by_layer(case: Case) -> dict[str, Any]:
    """Euclidean distance of each parameter to the retrained models', mean."""
    return case.once(_to_retrained)[1]
