"""Linear centred kernel alignment between two representations of the same images.

Definitions (Kornblith et al. 2019, section 3): with centred X (n, p) and Y (n, q),
CKA = |X'Y|^2 / (|X'X| |Y'Y|), Frobenius norms. It is 1 for representations equal up to rotation and
scale. Its biased estimate does not reach 0 for independent ones: with n images it stays near
d / (d + n) for isotropic d-dimensional features, so every value comes with the same value for
shuffled rows (the floor). The unbiased estimate (Song et al. 2012, eq. 5) has no such floor.

The whole set is one sum: covariances are accumulated in float64 over chunks of images, so no batch
size enters. ``legacy`` is the seed's mean of biased values of single batches, for comparison only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from letheon.kernels.keyed import permutation
from letheon.loaders.errors import InputError

_CHUNK = 8192  # images per covariance product


class Cka(NamedTuple):
    """One comparison of two representations; None with the reason where it is not defined."""

    value: float | None  # exact over all images, biased as every finite-sample CKA of this form
    unbiased: float | None  # from unbiased estimates; may be slightly negative
    floor: float | None  # `value` with the rows of one side shuffled
    reason: str | None = None


@dataclass(frozen=True)
class Centred:
    """One representation of n images, about its mean, with what only it determines."""

    name: str
    rows: Tensor  # (n, d) as given
    mean: Tensor  # (d,) float64
    lengths: Tensor  # (n,) float64: |x - mean|^2
    own: float = 0.0  # |X'X|^2

    def chunk(self, start: int, order: Tensor | None = None) -> Tensor:
        """(at most _CHUNK, d) float64 centred rows from `start`, of the rows in `order`."""
        taken = slice(start, start + _CHUNK)
        rows = self.rows[taken] if order is None else self.rows[order[taken]]
        return rows.double() - self.mean


def centred(name: str, rows: Tensor) -> Centred:
    """Prepare one side; its self term is then computed once for all comparisons.

    Args:
        name: what messages call it: the layer and the model.
        rows: (n, d) floating point.

    Raises:
        InputError: values that are not finite, naming the side.
    """
    broken = int((~rows.isfinite()).any(dim=1).sum())
    if broken:
        raise InputError(
            f"got NaN or infinite features for {broken} of {len(rows)} images in {name}; "
            "expected numbers; the model that made them has diverged"
        )
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(_CHUNK):
        total += part.double().sum(dim=0)
    mean = total / max(len(rows), 1)
    lengths = [(part.double() - mean).square().sum(dim=1) for part in rows.split(_CHUNK)]
    side = Centred(name, rows, mean, torch.cat(lengths))
    return replace(side, own=_energy(side, side))


def _energy(x: Centred, y: Centred, order: Tensor | None = None) -> float:
    """|X'Y|^2 = <XX', YY'>, by whichever of the two forms is the smaller product."""
    n = len(x.rows)
    wide = x.rows.shape[1] * y.rows.shape[1] > n * (x.rows.shape[1] + y.rows.shape[1]) / 2
    if wide and n <= _CHUNK:
        left, right = x.chunk(0), y.chunk(0, order)
        return float(((left @ left.T) * (right @ right.T)).sum())
    cross = torch.zeros(x.rows.shape[1], y.rows.shape[1], dtype=torch.float64, device=x.rows.device)
    for start in range(0, n, _CHUNK):
        cross.addmm_(x.chunk(start).T, y.chunk(start, order))
    return float(cross.square().sum())


def _unbiased_hsic(energy: float, a: Tensor, b: Tensor) -> float:
    """Song et al. 2012, eq. 5, from |X'Y|^2 and the squared lengths of the centred rows.

    With zero-diagonal Gram matrices of centred rows: 1'K1 = -sum a, (K1)_i = -a_i and
    tr(KL) = |X'Y|^2 - sum ab. The estimate does not change when rows are centred.
    """
    n = len(a)
    both, left, right = float((a * b).sum()), float(a.sum()), float(b.sum())
    total = energy - both + left * right / ((n - 1) * (n - 2)) - 2 * both / (n - 2)
    return total / (n * (n - 3))


def _ratio(cross: float, left: float, right: float) -> float | None:
    product = left * right
    return cross / product**0.5 if left > 0 and right > 0 and product > 0 else None


def _constant(side: Centred) -> bool:
    """No spread beyond what rounding of float32 features leaves."""
    scale = float(side.rows.abs().max()) if side.rows.numel() else 0.0
    return bool(side.lengths.max() <= side.rows.shape[1] * (scale * 2.0**-22) ** 2)


def compare(x: Centred, y: Centred, seed: int = 2) -> Cka:
    """CKA of two representations of the same images in the same order, with its floor.

    Args:
        x: one side.
        y: the other, on the same device.
        seed: of the shuffle of the floor.
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
    shuffled = _energy(x, y, permutation(seed, "cka-floor", 0, n).to(x.rows.device))
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
    """Ratio of sums of unbiased HSIC over batches (Nguyen et al. 2021, eq. 3 and 4).

    For features that never exist together; batches of fewer than 4 images are left out. The whole
    set at once, `unbiased_cka`, has less variance.
    """
    sums = [0.0, 0.0, 0.0]
    for left, right in zip(x.split(batch_size), y.split(batch_size), strict=True):
        if len(left) < 4:
            continue
        a, b = centred("x", left), centred("y", right)
        for place, (one, two, energy) in enumerate(
            [(a, b, _energy(a, b)), (a, a, a.own), (b, b, b.own)]
        ):
            sums[place] += _unbiased_hsic(energy, one.lengths, two.lengths)
    return _ratio(*sums)


def legacy_cka(x: Tensor, y: Tensor, batch_size: int = 512) -> float | None:
    """The seed's value: the plain mean over batches of each batch's biased CKA.

    Its floor is near 1 for d much above `batch_size`, it depends on the order of the images, and a
    short last batch counts as much as a full one. Batches where it is not defined are left out.
    """
    values = []
    for left, right in zip(x.split(batch_size), y.split(batch_size), strict=True):
        a, b = centred("x", left), centred("y", right)
        value = _ratio(_energy(a, b), a.own, b.own)
        if value is not None:
            values.append(value)
    return sum(values) / len(values) if values else None
