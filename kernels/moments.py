"""Streaming sums for centred kernel alignment (CKA), of whole sets and of batches.

`Moments` gives the exact linear CKA of a whole set from its covariances, whatever the batches.
`BatchHsic` gives the minibatch estimate for every pair of layers of two networks, where a layer is
too wide for a covariance. Both hold float64 sums that add over batches and over ranks: reduce
`tensors()` by sum and read `cka` after. Nothing waits for the host. No Triton form: the work is
matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from letheon.kernels.similarity import as_rows, gram

_NO_VARIANCE = 1e-12  # of the uncentred energy; rounding of float64 sums is far below


class Moments:
    """Sums over samples of several feature blocks side by side, and of their products.

    The blocks are views of the same samples: one pooled layer in two or more models, say. All
    pairs share one product per batch.
    """

    def __init__(
        self,
        widths: Sequence[int],
        device: torch.device | str = "cpu",
        shift: Tensor | None = None,
        products: torch.dtype = torch.float64,
    ) -> None:
        """Start with no samples.

        Args:
            widths: features of each block; D is their sum, and (D, D) float64 are kept.
            device: where the sums live.
            shift: (D,), subtracted from every sample before it is summed, the same on all ranks:
                roughly the mean, such as that of rank 0's first batch. Needed where `products`
                is float32 and the features' mean is large beside their spread.
            products: float64, or float32 for a device on which float64 products are slow; each
                batch is then rounded to float32 (relative error about 1e-6) and still summed in
                float64. No gain on the CPU (benchmarks/results/kernels_cpu.csv).
        """
        self.widths = tuple(widths)
        self.products = products
        total = sum(widths)
        self.shift = None if shift is None else shift.to(device, torch.float64)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = torch.zeros(total, dtype=torch.float64, device=device)
        self.outer = torch.zeros(total, total, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, *blocks: Tensor) -> None:
        """Add samples: one (b, width) tensor per block, any float types."""
        rows = torch.cat([block.to(torch.float64) for block in blocks], 1)  # (b, D)
        if self.shift is not None:
            rows = rows - self.shift
        self.count += rows.shape[0]
        self.sums += rows.sum(0)
        part = rows.to(self.products)
        if self.products == torch.float64:
            self.outer.addmm_(part.T, part)
        else:
            self.outer += part.T @ part

    def tensors(self) -> list[Tensor]:
        """The sums themselves, to be reduced over ranks in place."""
        return [self.count, self.sums, self.outer]

    def cka(self, first: int, second: int) -> Tensor:
        """0-dim float64: the linear CKA of two blocks; see `cka_from_moments`."""
        x, y = self._slice(first), self._slice(second)
        return cka_from_moments(
            self.count, self.sums[x], self.sums[y],
            self.outer[x, x], self.outer[y, y], self.outer[x, y],
        )  # fmt: skip

    def _slice(self, block: int) -> slice:
        start = sum(self.widths[:block])
        return slice(start, start + self.widths[block])


def cka_from_moments(
    n: Tensor, sum_x: Tensor, sum_y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor
) -> Tensor:
    """Linear CKA |X'Y|^2 / (|X'X| |Y'Y|) of centred features (Kornblith et al. 2019).

    Exact over the n samples, and therefore with the bias of n samples: for independent features it
    tends to d / (d + n), d being the effective width. NaN where a side does not vary.

    Args:
        n: 0-dim, number of samples.
        sum_x: (p,) sums of x.
        sum_y: (q,) sums of y.
        xx: (p, p) sums of x_i x_j, not centred.
        yy: (q, q), likewise.
        xy: (p, q), likewise.
    """
    spread_x = _varying(xx, xx - torch.outer(sum_x, sum_x) / n)
    spread_y = _varying(yy, yy - torch.outer(sum_y, sum_y) / n)
    shared = torch.linalg.matrix_norm(xy - torch.outer(sum_x, sum_y) / n)
    return shared.square() / (spread_x * spread_y)


def _varying(raw: Tensor, centred: Tensor) -> Tensor:
    """The Frobenius norm of the centred sums, or NaN where nothing but rounding is left."""
    norm = torch.linalg.matrix_norm(centred)
    return torch.where(norm > _NO_VARIANCE * torch.linalg.matrix_norm(raw), norm, torch.nan)


class BatchHsic:
    """Minibatch CKA between all layers of two networks (Nguyen et al. 2021).

    The unbiased HSIC of Song et al. (2012) is summed over batches for each pair of layers and for
    each layer with itself; CKA is the ratio of those sums, never a mean of ratios. Each layer's
    Gram matrix is made once a batch, and all pairs are one matrix product.
    """

    def __init__(self, layers_x: int, layers_y: int, device: torch.device | str = "cpu") -> None:
        self.xy = torch.zeros(layers_x, layers_y, dtype=torch.float64, device=device)
        self.xx = torch.zeros(layers_x, dtype=torch.float64, device=device)
        self.yy = torch.zeros(layers_y, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Add a batch: one (b, ...) tensor per layer, of the same b >= 4 samples in all.

        Raises:
            ValueError: fewer than four samples, for which the estimator is not defined.
        """
        x, y = centred_grams(xs), centred_grams(ys)  # (layers, b * b) float64
        self.xy += x @ y.T
        self.xx += x.square().sum(1)
        self.yy += y.square().sum(1)

    def tensors(self) -> list[Tensor]:
        """The sums themselves, to be reduced over ranks in place."""
        return [self.xy, self.xx, self.yy]

    def cka(self) -> Tensor:
        """(layers_x, layers_y) float64; about 0 for independent features, NaN for constant ones."""
        return self.xy / (self.xx[:, None] * self.yy[None, :]).sqrt()


def centred_grams(layers: Sequence[Tensor]) -> Tensor:
    """(layers, b * b) float64, such that products of rows are unbiased HSIC values.

    Each Gram matrix is U-centred (Szekely and Rizzo 2014): the inner product of two, over
    b (b - 3), is the unbiased estimator of Song et al. (2012). The division is split evenly
    between the two.
    """
    b = layers[0].shape[0]
    if b < 4:
        raise ValueError(
            f"got a batch of {b} samples, expected at least 4: the unbiased HSIC has no value for "
            "fewer; use a larger batch or leave this one out"
        )
    grams = torch.stack([_off_diagonal(layer) for layer in layers])  # (layers, b, b)
    rows = grams.sum(2, keepdim=True) / (b - 2)
    everything = grams.sum((1, 2), keepdim=True) / ((b - 1) * (b - 2))
    centred = grams - rows - rows.transpose(1, 2) + everything
    centred.diagonal(dim1=1, dim2=2).zero_()
    return centred.flatten(1) / (b * (b - 3)) ** 0.5


def _off_diagonal(features: Tensor) -> Tensor:
    products = gram(as_rows(features)).to(torch.float64)
    products.diagonal().zero_()
    return products
