"""Linear centered kernel alignment between two representations of the same images.

With centered X (n, p) and Y (n, q), CKA = |X'Y|^2 / (|X'X| |Y'Y|), Frobenius norms (Kornblith et
al. 2019, section 3). It is 1 for representations equal up to rotation and scale. Its biased
estimate does not reach 0 for independent ones: with n images it stays near d / (d + n) for
isotropic d-dimensional features, so every value comes with its floor, the expected value when the
images of one side are shuffled. The unbiased estimate (Song et al. 2012, equation 5) has no floor.

The whole set is one sum in float64, so no batch size enters. ``legacy`` is the seed's mean of
biased values of single batches, for comparison only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.inference.passes import Passes
from letheon.eval.metrics.registry import NUMBERS_BY_NAME, Part, Summary, metric

if TYPE_CHECKING:
    from letheon.eval.case import Case

_CHUNK = 8192  # images per covariance product


class Cka(NamedTuple):
    """One comparison of two representations; None with the reason where it is not defined."""

    value: float | None  # exact over all images, with the bias of that many images
    unbiased: float | None  # may be slightly negative; None for fewer than 4 images
    floor: float | None  # the mean of `value` over all shufflings of one side's rows
    reason: str | None = None


@dataclass(frozen=True)
class Centered:
    """One representation of n images, about its mean, with what only it determines."""

    name: str
    rows: Tensor  # (n, d) as given
    mean: Tensor  # (d,) float64
    lengths: Tensor  # (n,) float64: |x - mean|^2
    own: float = 0.0  # |X'X|^2

    def chunk(self, start: int) -> Tensor:
        """(at most _CHUNK, d) float64 centered rows from `start`, on the device."""
        part = self.rows[start : start + _CHUNK]
        return part.to(self.mean.device).double() - self.mean


def center(name: str, rows: Tensor, device: torch.device | None = None) -> Centered:
    """Center one side; its self term is then computed once for all comparisons.

    Args:
        name: what messages call it: the layer, the model and the set.
        rows: (n, d) floating point, in memory of any kind.
        device: where the arithmetic is done; default that of the rows.

    Raises:
        RunFailed: values that are not finite; the text names the side.
    """
    parts = rows.split(_CHUNK)
    broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in parts)
    if broken:
        raise RunFailed(
            f"got NaN or infinite features for {broken} of {len(rows)} images in {name}; "
            "expected numbers; the model that made them has diverged"
        )
    mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=device or rows.device)
    for part in parts:
        mean += part.to(mean.device).double().sum(dim=0) / len(rows)
    side = Centered(name, rows, mean, mean[:0])
    starts = range(0, max(len(rows), 1), _CHUNK)
    lengths = torch.cat([side.chunk(start).square().sum(dim=1) for start in starts])
    side = replace(side, lengths=lengths)
    return replace(side, own=_energy(side, side))


def _energy(x: Centered, y: Centered) -> float:
    """|X'Y|^2 = <XX', YY'>, by whichever of the two forms needs the smaller products."""
    n, (p, q) = len(x.rows), (x.rows.shape[1], y.rows.shape[1])
    if n <= _CHUNK and n * (p + q) < p * q:
        left, right = x.chunk(0), y.chunk(0)
        return float(((left @ left.T) * (right @ right.T)).sum())
    cross = torch.zeros(p, q, dtype=torch.float64, device=x.mean.device)
    for start in range(0, n, _CHUNK):
        cross.addmm_(x.chunk(start).T, y.chunk(start))
    return float(cross.square().sum())


def _unbiased_hsic(energy: float, a: Tensor, b: Tensor) -> float:
    """Song et al. 2012, equation 5, from |X'Y|^2 and the squared lengths of the centered rows.

    With zero-diagonal Gram matrices of centered rows, 1'K1 = -sum a, (K1)_i = -a_i and
    tr(KL) = |X'Y|^2 - sum ab. The estimate does not change when rows are centered.
    """
    n = len(a)
    both, left, right = float((a * b).sum()), float(a.sum()), float(b.sum())
    total = energy - both + left * right / ((n - 1) * (n - 2)) - 2 * both / (n - 2)
    return total / (n * (n - 3))


def _ratio(cross: float, own: float, other: float) -> float | None:
    if not (own > 0 and other > 0):
        return None
    return cross / own**0.5 / other**0.5


def _constant(side: Centered) -> bool:
    """No spread beyond the rounding of float32 features."""
    scale = max(
        (float(part.abs().max()) for part in side.rows.split(_CHUNK) if part.numel()), default=0.0
    )
    return bool(side.lengths.max() <= side.rows.shape[1] * (scale * 2.0**-22) ** 2)


def compare(x: Centered, y: Centered) -> Cka:
    """Compute CKA of two representations of the same images in the same order and on one device.

    The floor is tr(XX') tr(YY') / ((n - 1) |X'X| |Y'Y|): for centered Gram matrices the mean of
    <K, PLP'> over all permutations P is tr(K) tr(L) / (n - 1).
    """
    n = len(x.rows)
    if n != len(y.rows):
        raise InputError(f"got {n} images in {x.name} and {len(y.rows)} in {y.name}; use the same")
    if n < 2:
        return Cka(None, None, None, f"{n} images; CKA needs at least 2")
    for side in (x, y):
        if _constant(side):
            return Cka(None, None, None, f"{side.name} is constant over the images")
    cross = _energy(x, y)
    shuffled = float(x.lengths.sum()) * float(y.lengths.sum()) / (n - 1)
    unbiased = None
    if n > 3:
        unbiased = _ratio(
            _unbiased_hsic(cross, x.lengths, y.lengths),
            _unbiased_hsic(x.own, x.lengths, x.lengths),
            _unbiased_hsic(y.own, y.lengths, y.lengths),
        )
    return Cka(_ratio(cross, x.own, y.own), unbiased, _ratio(shuffled, x.own, y.own))


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Compute exact biased linear CKA of (n, p) and (n, q); None where a side is constant."""
    return compare(center("x", x), center("y", y)).value


def legacy_cka(x: Tensor, y: Tensor, batch_size: int = 512) -> float | None:
    """Average each batch's biased CKA over batches: the seed's value.

    Its floor is near 1 for d much above `batch_size`, it depends on the order of the images, and a
    short last batch counts as much as a full one. Batches where it is not defined are left out.
    """
    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    values = [v for left, right in pairs if (v := linear_cka(left, right)) is not None]
    return sum(values) / len(values) if values else None


_FLOOR = "With the rows of one model shuffled: what unrelated features reach."
PARTS = {
    "_forget": Part(" (forget)", "On the held-out images of the forgotten classes only."),
    "_retain": Part(" (retain)", "On the held-out images of the other classes only."),
    "_floor": Part(" (floor)", _FLOOR),
    "_unbiased": Part(
        " (unbiased)", "With the unbiased estimator: about 0 for unrelated features."
    ),
}


def side(passes: Passes, part: str, device: torch.device) -> Centered:
    """Center the test features of "all", the "forget" or the "retain" samples; kept in `passes`."""

    def compute() -> Centered:
        test = passes.outputs["test"]
        rows = {"forget": test.forget, "retain": ~test.forget}.get(part)
        label = f"the pooled features of {passes.name} on the test set ({part})"
        return center(label, test.features if rows is None else test.features[rows], device)

    return passes.once(f"cka {part} on {device}", compute)


def layer(passes: Passes, tap: str, device: torch.device) -> Centered:
    """Center the pooled output of a layer on the test set; kept in `passes`."""

    def compute() -> Centered:
        label = f"layer {tap} of {passes.name} on the test set"
        return center(label, passes.outputs["test"].taps[tap], device)

    return passes.once(f"cka layer {tap} on {device}", compute)


def check_same_images(model: Passes, other: Passes) -> None:
    """Check that two models were shown the same test images.

    Raises:
        InputError: other images or labels.
    """
    left, right = model.outputs["test"], other.outputs["test"]
    if not (left.index.equal(right.index) and left.labels.equal(right.labels)):
        raise InputError(
            f"got different test sets for {model.name} ({len(left)} images) and {other.name} "
            f"({len(right)}); measure both on the same"
        )


def _against(case: Case, other: Passes) -> dict[str, Any]:
    """Suffix -> CKA of pooled test features; where it is not defined, why."""
    model, device = case.passes, case.ranks.device
    check_same_images(model, other)
    values: dict[str, Any] = {}
    for part, suffix in (("all", ""), ("forget", "_forget"), ("retain", "_retain")):
        x, y = side(model, part, device), side(other, part, device)
        result = compare(x, y)
        value = result.value
        if case.conditions.cka == "legacy" and value is not None:
            value = legacy_cka(x.rows, y.rows, batch_size=512)
        reason = NotMeasurable(result.reason or f"{len(x.rows)} images are too few")
        values[suffix] = reason if value is None else value
        if part == "all":
            unbiased = result.unbiased
            values["_floor"] = reason if result.floor is None else result.floor
            values["_unbiased"] = reason if unbiased is None else unbiased
    return values


@metric(
    "cka_original", title="CKA to original", group="Representation and probes",
    better="as retrained", needs=("original",), everywhere=True, parts=PARTS, place=2,
    source="Kornblith et al. 2019, section 3",
    summary=Summary(
        "CKA orig", "likeness of the features to the original model's (1: the same up to rotation)",
        7,
    ),
)  # fmt: skip
def cka_original(case: Case) -> dict[str, Any]:
    """Linear CKA of pooled features with the original model over the whole test set,
    |Y'X|^2 / (|X'X| |Y'Y|) with centered features and Frobenius norms.
    """
    return _against(case, case.original.passes)


@metric(
    "cka_retrained", title="CKA to retrained", group="Representation and probes", better="high",
    needs=("reference",), everywhere=True, place=3,
    parts=PARTS | {"_floor": Part(" (floor)", _FLOOR, Summary(
        "floor", "CKA retr with the images of one model shuffled: what unrelated features reach", 9
    ))},
    source="Kornblith et al. 2019, section 3",
    summary=Summary("CKA retr", "likeness of the features to the retrained model's", 8),
)  # fmt: skip
def cka_retrained(case: Case) -> dict[str, Any]:
    """Linear CKA of pooled features with the retrained model over the whole test set."""
    return _against(case, case.reference.passes)


def _by_layer(case: Case) -> dict[str, Cka]:
    """Layer -> CKA to the reference, for the layers that both models have."""
    model, other, device = case.passes, case.reference.passes, case.ranks.device
    if case.is_reference:
        raise NotMeasurable("this is the reference itself")
    check_same_images(model, other)
    shared = [tap for tap in model.outputs["test"].taps if tap in other.outputs["test"].taps]
    if not shared:
        raise NotMeasurable("got no layers that both models have")
    return {tap: compare(layer(model, tap, device), layer(other, tap, device)) for tap in shared}


@metric(
    "cka_by_layer", title="CKA by layer", group="Representation and probes", unit="table",
    needs=("reference", "depth full"), everywhere=True, reads=_by_layer, place=20,
    schema=NUMBERS_BY_NAME,
)  # fmt: skip
def cka_by_layer(case: Case) -> dict[str, Any]:
    """Linear CKA of each layer's pooled output with the retrained model's, over the test set."""
    return {
        tap: NotMeasurable(each.reason) if each.reason else each.value
        for tap, each in case.once(_by_layer).items()
    }


@metric(
    "cka_floor_by_layer", title="CKA floor by layer", group="Representation and probes",
    unit="table", needs=("reference", "depth full"), everywhere=True, reads=_by_layer, place=21,
    schema=NUMBERS_BY_NAME,
)  # fmt: skip
def cka_floor_by_layer(case: Case) -> dict[str, float | None]:
    """The mean of the same CKA over all shufflings of one model's images, layer by layer."""
    return {tap: each.floor for tap, each in case.once(_by_layer).items()}


def cka_band(retrained: Sequence[Passes], ranks: Ranks | None = None) -> dict[str, Any]:
    """Compare independent retrained models by CKA: how far 1 is out of reach.

    Args:
        retrained: passes of models retrained with different seeds.
        ranks: the arithmetic is done on its device; no communication.

    Returns:
        "low", "mean", "high" of the exact CKA of pooled test features over all pairs, and "pairs";
        None each where there are fewer than two models.
    """
    device = (ranks or Ranks()).device
    values = []
    for first, second in combinations(retrained, 2):
        check_same_images(first, second)
        value = compare(side(first, "all", device), side(second, "all", device)).value
        if value is not None:
            values.append(value)
    if not values:
        return {"low": None, "mean": None, "high": None, "pairs": 0}
    return {"low": min(values), "mean": fmean(values), "high": max(values), "pairs": len(values)}
