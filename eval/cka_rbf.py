"""CKA with a Gaussian kernel, for small sets: sees likeness that no rotation explains."""

from __future__ import annotations

import torch
from torch import Tensor

from letheon.errors import InputError

_MOST = 10_000  # images: two (n, n) float64 matrices of 800 MB


def rbf_cka(x: Tensor, y: Tensor, share: float = 1.0) -> float | None:
    """CKA of exp(-|a - b|^2 / 2 sigma^2), sigma a share of the median distance, in float64.

    Kornblith et al. 2019, section 3 and its appendix: biased HSIC, bandwidth per side; here the
    median is over the pairs of different images.

    Args:
        x: (n, p) floating point, 2 <= n <= 10,000.
        y: (n, q), the same images.
        share: of the median distance; 0.2 to 1 are usual, large values tend to linear CKA.

    Returns:
        In [0, 1]; None where a side is constant.

    Raises:
        InputError: values that are not finite, other numbers of images, a share of 0 or less.
    """
    if not share > 0:
        raise InputError(f"got a bandwidth of {share} median distances; expected more than 0")
    if len(x) != len(y) or not 2 <= len(x) <= _MOST:
        raise InputError(
            f"got {len(x)} and {len(y)} images; the Gaussian kernel needs the same 2 to {_MOST} "
            "on both sides; use linear CKA for more"
        )
    kernels = [_kernel(rows, share) for rows in (x, y)]
    left, right = (None if k is None else _double_centred(k) for k in kernels)
    if left is None or right is None:
        return None
    return float((left * right).sum() / (left.norm() * right.norm()))


def _kernel(rows: Tensor, share: float) -> Tensor | None:
    """(n, n) float64, or None where all rows are equal."""
    if not bool(rows.isfinite().all()):
        raise InputError("got NaN or infinite features; expected numbers; the model has diverged")
    wide = rows.double()
    # Differences, not inner products: those lose the digits of rows that are close together.
    distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    n = len(rows)
    pairs = distances[torch.triu(torch.ones(n, n, dtype=torch.bool, device=rows.device), 1)]
    sigma = share * float(pairs.median())
    if sigma == 0:
        sigma = share * float(pairs.mean())  # more than half of the pairs are equal
    return torch.exp(-(distances**2) / (2 * sigma**2)) if sigma > 0 else None


def _double_centred(kernel: Tensor) -> Tensor:
    rows = kernel.mean(dim=1, keepdim=True)
    return kernel - rows - rows.T + rows.mean()
