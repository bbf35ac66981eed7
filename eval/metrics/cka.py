"""Linear centred kernel alignment between two representations of the same images.

With centred X (n, p) and Y (n, q), CKA = |X'Y|^2 / (|X'X| |Y'Y|), Frobenius norms (Kornblith et
al. 2019, section 3). It is 1 for representations equal up to rotation and scale. Its biased
estimate does not reach 0 for independent ones: with n images it stays near d / (d + n) for
isotropic d-dimensional features, so every value comes with its floor, the expected value when the
images of one side are shuffled. The unbiased estimate (Song et al. 2012, equation 5) has no floor.

The whole set is one sum in float64, so no batch size enters. ``legacy`` is the seed's mean of
biased values of single batches, for comparison only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from letheon.errors import InputError
from letheon.kernels.moments import BatchHsic

_CHUNK = 8192  # images per covariance product


class Cka(NamedTuple):
    """One comparison of two representations; None with the reason where it is not defined."""

    value: float | None  # exact over all images, with the bias of that many images
    unbiased: float | None  # may be slightly negative; None for fewer than 4 images
    floor: float | None  # the mean of `value` over all shufflings of one side's rows
    reason: str | None = None


@dataclass(frozen=True)
class Centred:
    """One representation of n images, about its mean, with what only it determines."""

    name: str
    rows: Tensor  # (n, d) as given
    mean: Tensor  # (d,) float64
    lengths: Tensor  # (n,) float64: |x - mean|^2
    own: float = 0.0  # |X'X|^2

    def chunk(self, start: int) -> Tensor:
        """(at most _CHUNK, d) float64 centred rows from `start`, on the device."""
        part = self.rows[start : start + _CHUNK]
        return part.to(self.mean.device).double() - self.mean


def centred(name: str, rows: Tensor, device: torch.device | None = None) -> Centred:
    """Prepare one side; its self term is then computed once for all comparisons.

    Args:
        name: what messages call it: the layer, the model and the set.
        rows: (n, d) floating point, in memory of any kind.
        device: where the arithmetic is done; default that of the rows.

    Raises:
        InputError: values that are not finite, naming the side.
    """
    parts = rows.split(_CHUNK)
    broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in parts)
    if broken:
        raise InputError(
            f"got NaN or infinite features for {broken} of {len(rows)} images in {name}; "
            "expected numbers; the model that made them has diverged"
        )
    mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=device or rows.device)
    for part in parts:
        mean += part.to(mean.device).double().sum(dim=0) / len(rows)
    side = Centred(name, rows, mean, mean[:0])
    starts = range(0, max(len(rows), 1), _CHUNK)
    lengths = torch.cat([side.chunk(start).square().sum(dim=1) for start in starts])
    side = replace(side, lengths=lengths)
    return replace(side, own=_energy(side, side))


def _energy(x: Centred, y: Centred) -> float:
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
    """Song et al. 2012, equation 5, from |X'Y|^2 and the squared lengths of the centred rows.

    With zero-diagonal Gram matrices of centred rows, 1'K1 = -sum a, (K1)_i = -a_i and
    tr(KL) = |X'Y|^2 - sum ab. The estimate does not change when rows are centred.
    """
    n = len(a)
    both, left, right = float((a * b).sum()), float(a.sum()), float(b.sum())
    total = energy - both + left * right / ((n - 1) * (n - 2)) - 2 * both / (n - 2)
    return total / (n * (n - 3))


def _ratio(cross: float, left: float, right: float) -> float | None:
    if not (left > 0 and right > 0):
        return None
    return cross / left**0.5 / right**0.5


def _constant(side: Centred) -> bool:
    """No spread beyond the rounding of float32 features."""
    scale = max(
        (float(part.abs().max()) for part in side.rows.split(_CHUNK) if part.numel()), default=0.0
    )
    return bool(side.lengths.max() <= side.rows.shape[1] * (scale * 2.0**-22) ** 2)


def compare(x: Centred, y: Centred) -> Cka:
    """CKA of two representations of the same images in the same order, on the same device.

    The floor is tr(XX') tr(YY') / ((n - 1) |X'X| |Y'Y|): for centred Gram matrices the mean of
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
    """Exact biased linear CKA of (n, p) and (n, q); None where a side is constant."""
    return compare(centred("x", x), centred("y", y)).value


def unbiased_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear CKA from unbiased HSIC over the whole set; None where not defined (n < 4)."""
    return compare(centred("x", x), centred("y", y)).unbiased


def minibatch_cka(x: Tensor, y: Tensor, batch_size: int = 512) -> float | None:
    """Ratio of sums of unbiased HSIC over batches (Nguyen et al. 2021, equations 2 and 3).

    For features that never exist together; batches of fewer than 4 images are left out. Batches of
    neighbouring images, all of a class or two, give another value than shuffled ones do; the whole
    set at once, `unbiased_cka`, does not depend on the order.
    """
    sums = BatchHsic(1, 1, x.device)
    for left, right in zip(x.split(batch_size), y.split(batch_size), strict=True):
        if len(left) >= 4:
            sums.add([left.double()], [right.double()])
    return _ratio(float(sums.xy[0, 0]), float(sums.xx[0]), float(sums.yy[0]))


def legacy_cka(x: Tensor, y: Tensor, batch_size: int = 512) -> float | None:
    """The seed's value: the plain mean over batches of each batch's biased CKA.

    Its floor is near 1 for d much above `batch_size`, it depends on the order of the images, and a
    short last batch counts as much as a full one. Batches where it is not defined are left out.
    """
    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    found = [linear_cka(left, right) for left, right in pairs]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values else None
