"""Linear centered kernel alignment between two representations of the same images.

With centered X (n, p) and Y (n, q), CKA = |X'Y|^2 / (|X'X| |Y'Y|), Frobenius norms (Kornblith et
al. 2019, section 3). It is 1 for representations equal up to rotation and scale. Its biased
estimate does not reach 0 for independent ones: with n images it stays near d / (d + n) for
isotropic d-dimensional features, so every value comes with its floor, the expected value when the
images of one side are shuffled. The unbiased estimate (Song et al. 2012, equation 5) has no floor.

The whole set is one sum in float64, over the shares of all ranks, so no batch size enters.
``legacy`` is the seed's mean of biased values of single batches, for comparison only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows, sum_over_ranks
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
    """One representation of n images, about its mean, with what only it determines.

    Letters: m of the n images are this rank's, in d dimensions.
    """

    name: str
    rows: Tensor  # (m or more, d) as given
    places: Tensor | None  # (m,) int64: which of the rows are meant; None for all
    count: int  # n, over all ranks
    mean: Tensor  # (d,) float64
    lengths: Tensor  # (m,) float64: |x - mean|^2
    ranks: Ranks
    scale: float = 0.0  # largest size of a value, over all ranks
    own: float = 0.0  # |X'X|^2

    @property
    def held(self) -> int:
        """Count this rank's images, m."""
        return len(self.rows) if self.places is None else len(self.places)

    def raw(self, start: int, stop: int) -> Tensor:
        """(at most stop - start, d) rows of this rank as given."""
        if self.places is None:
            return self.rows[start:stop]
        return self.rows[self.places[start:stop]]

    def chunk(self, start: int) -> Tensor:
        """(at most _CHUNK, d) float64 centered rows of this rank from `start`, on the device."""
        return self.raw(start, start + _CHUNK).to(self.mean.device).double() - self.mean


def center(
    name: str,
    rows: Tensor,
    device: torch.device | None = None,
    ranks: Ranks | None = None,
    where: Tensor | None = None,
) -> Centered:
    """Center one side; its self term is then computed once for all comparisons.

    Args:
        name: what messages call it: the layer, the model and the set.
        rows: (m, d) floating point, in memory of any kind: this rank's.
        device: where the arithmetic is done; default that of the rows.
        ranks: the job whose other ranks hold the other rows, all of which must call; default: none.
        where: (m,) bool: the rows that are meant; they are read in place, not copied.

    Raises:
        RunFailed: values that are not finite, on every rank; the text names the side.
    """
    places = None if where is None else where.nonzero()[:, 0]
    mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=device or rows.device)
    side = Centered(name, rows, places, 0, mean, mean[:0], ranks or Ranks())
    starts = range(0, side.held, _CHUNK)
    broken = mean.new_tensor([0.0, float(side.held)])
    sizes = [mean.new_zeros(1)]
    for start in starts:
        part = side.raw(start, start + _CHUNK).to(mean.device)
        broken[0] += int((~part.isfinite()).any(dim=1).sum())
        sizes.append(part.abs().max().double()[None])
    sum_over_ranks([broken], side.ranks)
    n = int(broken[1])
    if int(broken[0]):
        raise RunFailed(
            f"got NaN or infinite features for {int(broken[0])} of {n} images in {name}; "
            "expected numbers; the model that made them has diverged"
        )
    for start in starts:
        mean += side.raw(start, start + _CHUNK).to(mean.device).double().sum(dim=0) / n
    sum_over_ranks([mean], side.ranks)
    lengths = [mean[:0], *(side.chunk(start).square().sum(dim=1) for start in starts)]
    scale = float(gather_rows(torch.cat(sizes).max()[None], side.ranks).max())
    side = replace(side, count=n, lengths=torch.cat(lengths), scale=scale)
    return replace(side, own=_energy(side, side))


def _energy(x: Centered, y: Centered) -> float:
    """|X'Y|^2 = <XX', YY'>, on one rank by whichever of the two forms needs smaller products."""
    n, (p, q) = x.held, (x.rows.shape[1], y.rows.shape[1])
    if x.ranks.world == 1 and n <= _CHUNK and n * (p + q) < p * q:
        left, right = x.chunk(0), y.chunk(0)
        return float(((left @ left.T) * (right @ right.T)).sum())
    cross = torch.zeros(p, q, dtype=torch.float64, device=x.mean.device)
    for start in range(0, n, _CHUNK):
        cross.addmm_(x.chunk(start).T, y.chunk(start))
    sum_over_ranks([cross], x.ranks)
    return float(cross.square().sum())


def _sum(values: Tensor, ranks: Ranks) -> float:
    """Sum the numbers of all ranks."""
    total = values.sum()[None]
    sum_over_ranks([total], ranks)
    return float(total)


def _unbiased_hsic(energy: float, x: Centered, y: Centered) -> float:
    """Song et al. 2012, equation 5, from |X'Y|^2 and the squared lengths of the centered rows.

    With zero-diagonal Gram matrices of centered rows, 1'K1 = -sum a, (K1)_i = -a_i and
    tr(KL) = |X'Y|^2 - sum ab. The estimate does not change when rows are centered.
    """
    n, a, b = x.count, x.lengths, y.lengths
    both, left, right = (_sum(each, x.ranks) for each in (a * b, a, b))
    total = energy - both + left * right / ((n - 1) * (n - 2)) - 2 * both / (n - 2)
    return total / (n * (n - 3))


def _ratio(cross: float, own: float, other: float) -> float | None:
    if not (own > 0 and other > 0):
        return None
    return cross / own**0.5 / other**0.5


def _constant(side: Centered) -> bool:
    """No spread beyond the rounding of float32 features."""
    longest = torch.cat([side.lengths, side.mean.new_zeros(1)]).max()[None]
    longest = gather_rows(longest, side.ranks).max()
    return bool(longest <= side.rows.shape[1] * (side.scale * 2.0**-22) ** 2)


def compare(x: Centered, y: Centered) -> Cka:
    """Compute CKA of two representations of the same images in the same order and on one device.

    The floor is tr(XX') tr(YY') / ((n - 1) |X'X| |Y'Y|): for centered Gram matrices the mean of
    <K, PLP'> over all permutations P is tr(K) tr(L) / (n - 1). Every rank must call.
    """
    n = x.count
    if n != y.count:
        raise InputError(f"got {n} images in {x.name} and {y.count} in {y.name}; use the same")
    if n < 2:
        return Cka(None, None, None, f"{n} images; CKA needs at least 2")
    for side in (x, y):
        if _constant(side):
            return Cka(None, None, None, f"{side.name} is constant over the images")
    cross = _energy(x, y)
    shuffled = _sum(x.lengths, x.ranks) * _sum(y.lengths, y.ranks) / (n - 1)
    unbiased = None
    if n > 3:
        unbiased = _ratio(
            _unbiased_hsic(cross, x, y),
            _unbiased_hsic(x.own, x, x),
            _unbiased_hsic(y.own, y, y),
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
    return _mean_of_batches(zip(x.split(batch_size), y.split(batch_size), strict=True))


def _mean_of_batches(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    values = [v for left, right in pairs if (v := linear_cka(left, right)) is not None]
    return sum(values) / len(values) if values else None


def _batches(x: Centered, y: Centered, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images of all ranks by batches, on every rank: of no more than one at a time."""
    counts = gather_rows(torch.tensor([x.held]), x.ranks)
    before = int(counts[: x.ranks.rank].sum())
    for first in range(0, x.count, batch_size):
        start, stop = (min(max(at - before, 0), x.held) for at in (first, first + batch_size))
        left, right = (gather_rows(each.raw(start, stop), x.ranks) for each in (x, y))
        yield left, right


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
        return center(label, test.features, device, test.ranks, rows)

    return passes.once(f"cka {part} on {device}", compute)


def layer(passes: Passes, tap: str, device: torch.device) -> Centered:
    """Center the pooled output of a layer on the test set; kept in `passes`."""

    def compute() -> Centered:
        label = f"layer {tap} of {passes.name} on the test set"
        test = passes.outputs["test"]
        return center(label, test.taps[tap], device, test.ranks)

    return passes.once(f"cka layer {tap} on {device}", compute)


def check_same_images(model: Passes, other: Passes) -> None:
    """Check that two models were shown the same test images.

    Raises:
        InputError: other images or labels.
    """
    left, right = model.outputs["test"], other.outputs["test"]
    same = left.index.equal(right.index) and left.labels.equal(right.labels)
    if not bool(left.gather(torch.tensor([same])).all()):
        raise InputError(
            f"got different test sets for {model.name} ({left.span()[1]} images) and {other.name} "
            f"({right.span()[1]}); measure both on the same"
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
            value = _mean_of_batches(_batches(x, y))
        reason = NotMeasurable(result.reason or f"{x.count} images are too few")
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
        ranks: the arithmetic is done on its device; every rank must call.

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
