"""Fit linear classifiers to rows that stay on their ranks: sums of gradients and moments travel.

The definitions are scikit-learn's (LogisticRegression with C = 1 by L-BFGS, RidgeClassifier with
alpha = 1), so are the optimizer and its tolerances; with one rank the predictions are its.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.distributed import Ranks, sum_over_ranks
from letheon.errors import RunFailed

_ROWS = 4096  # in float64 at once
_STEPS = 2000


@dataclass(frozen=True)
class Scaled:
    """This rank's rows, centered and scaled as they are read; a constant column is 0."""

    rows: Tensor  # (n, D) as given
    mean: Tensor  # (D,) float64
    spread: Tensor  # (D,) float64, infinite for a constant column
    count: int  # rows of all ranks

    def over(self, rows: Tensor) -> Scaled:
        """Scale other rows alike."""
        return replace(self, rows=rows)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows in parts: where they stand, and (at most _ROWS, D) float64."""
        for start in range(0, len(self.rows), _ROWS):
            part = slice(start, start + _ROWS)
            yield part, (self.rows[part].double() - self.mean) / self.spread

    def scores(self, weights: Tensor) -> Iterator[Tensor]:
        """Yield (at most _ROWS, C) scores under (D + 1, C) weights, the last line the offset."""
        for _, part in self.parts():
            yield torch.addmm(weights[-1], part, weights[:-1])


def fit_scale(rows: Tensor, ranks: Ranks) -> Scaled:
    """Find mean and standard deviation of each column over all ranks, which must all call.

    Raises:
        RunFailed: NaN or infinity, on every rank.
    """
    width = rows.shape[1]
    total = torch.zeros(width + 2, dtype=torch.float64)
    for part in rows.split(_ROWS):
        total[:width] += part.double().sum(dim=0)
        total[width] += len(part)
        total[width + 1] += int((~part.isfinite()).sum())
    sum_over_ranks([total], ranks)
    count = int(total[width])
    if int(total[width + 1]):
        raise RunFailed(
            f"got {int(total[width + 1])} of {count * width} values of training features that are "
            "NaN or infinite; expected finite numbers; the model has diverged or its outputs were "
            "cut short"
        )
    mean = total[:width] / count
    squares = torch.zeros_like(mean)
    for part in rows.split(_ROWS):
        squares += (part.double() - mean).square().sum(dim=0)
    sum_over_ranks([squares], ranks)
    spread = (squares / count).sqrt()
    spread[spread <= 1e-12 * (1 + mean.abs())] = torch.inf
    return Scaled(rows, mean, spread, count)


def fit_logistic(of: Scaled, labels: Tensor, classes: int, ranks: Ranks) -> Tensor:
    """(D + 1, C) weights of the multinomial logistic regression with half the squared weights.

    Of two classes the first has weights 0, as in scikit-learn.

    Args:
        of: this rank's rows.
        labels: (n,) int64 in 0..classes - 1.
        classes: C.
        ranks: the job; every rank must call. Rank 0 decides on the steps, all sum the gradient.
    """
    width, free = of.rows.shape[1] + 1, classes if classes > 2 else 1

    def whole(flat: NDArray[np.float64]) -> Tensor:
        weights = torch.from_numpy(flat).view(width, free)
        return weights if classes > 2 else torch.cat([torch.zeros_like(weights), weights], dim=1)

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = whole(flat)
        value, grad = torch.zeros(1, dtype=torch.float64), torch.zeros_like(weights)
        for part, rows in of.parts():
            log_p = torch.addmm(weights[-1], rows, weights[:-1]).log_softmax(dim=1)
            truth = labels[part]
            value -= log_p.gather(1, truth[:, None]).sum()
            error = log_p.exp() - F.one_hot(truth, classes)
            grad[:-1] += rows.T @ error
            grad[-1] += error.sum(dim=0)
        sum_over_ranks([value, grad], ranks)
        grad, value = grad[:, -free:] / of.count, value / of.count
        own = torch.from_numpy(flat).view(width, free)[:-1]
        grad[:-1] += own / of.count
        value += own.square().sum() / (2 * of.count)
        return float(value), grad.flatten().numpy()

    return whole(_minimize(loss, np.zeros(width * free), ranks))


Loss = Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]


def _minimize(loss: Loss, start: NDArray[np.float64], ranks: Ranks) -> NDArray[np.float64]:
    """Find the lowest point on rank 0; the others compute their part wherever it looks."""
    message = torch.zeros(len(start) + 1, dtype=torch.float64)  # the point, and whether it is last

    def ask(point: NDArray[np.float64], last: bool = False) -> None:
        message[:-1], message[-1] = torch.from_numpy(point), float(last)
        if ranks.world > 1:
            dist.broadcast(message, 0)

    def objective(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        ask(point)
        return loss(point)

    if ranks.main:
        from scipy.optimize import minimize  # here: half a second to import, on one rank

        options = {"maxiter": _STEPS, "maxls": 50, "gtol": 1e-4, "ftol": 64 * 2.0**-52}
        found = minimize(objective, start, method="L-BFGS-B", jac=True, options=options)
        ask(found.x, last=True)
    else:
        while True:
            ask(message[:-1].numpy())
            if message[-1]:
                break
            loss(message[:-1].numpy().copy())
    return message[:-1].numpy().copy()


def fit_ridge(of: Scaled, labels: Tensor, classes: int, ranks: Ranks) -> Tensor:
    """(D + 1, C) weights of one ridge regression a class, of 1 for its rows and -1 for the others.

    Args and Returns as of `fit_logistic`.
    """
    width = of.rows.shape[1]
    gram = torch.eye(width, dtype=torch.float64) / ranks.world  # alpha, once
    cross = torch.zeros(width, classes, dtype=torch.float64)
    sums = torch.zeros(classes, dtype=torch.float64)
    for part, rows in of.parts():
        signs = 2.0 * F.one_hot(labels[part], classes).double() - 1
        gram.addmm_(rows.T, rows)
        cross.addmm_(rows.T, signs)
        sums += signs.sum(dim=0)
    sum_over_ranks([gram, cross, sums], ranks)
    # The rows' mean is 0, so the offset is that of the signs.
    return torch.cat([torch.linalg.solve(gram, cross), (sums / of.count)[None]])
