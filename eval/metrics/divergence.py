"""How far two models' output distributions lie apart on the same samples.

All take logits (n, C), work in float64 in parts of the rows, and use natural logarithms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from letheon.errors import InputError

_ROWS = 8192  # rows in float64 at a time


def _by_rows(first: Tensor, second: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(n,) float64: `of` applied to matching parts of both log-probability tables."""
    if first.shape != second.shape or first.ndim != 2 or len(first) == 0 or first.shape[1] == 0:
        raise InputError(
            f"got logits of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected two "
            "tables samples x classes of the same shape, with at least one sample"
        )
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise InputError(
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


def js(first: Tensor, second: Tensor) -> float:
    """Mean over samples of JS(p || q) = KL(p || m)/2 + KL(q || m)/2, m = (p + q)/2; at most log 2.

    KL is summed over the classes and averaged over the samples. Released code of Bad-T and SSD
    averages over the classes too, which divides by C and makes values of different data sets
    incomparable; that is not offered.
    """
    return float(js_rows(first, second).mean())


def zrf(unlearned: Tensor, random_network: Tensor) -> float:
    """Zero-retrain forgetting: 1 - JS to an untrained network, on the forget set.

    Chundawat et al. 2023, with JS in nats as in `js`, so the value lies in [1 - log 2, 1]. High
    where the model is as ignorant as the untrained one; compare with the retrained model's value.
    """
    return 1 - js(unlearned, random_network)


def activation_distance(first: Tensor, second: Tensor) -> float:
    """Mean over samples of the Euclidean distance of both softmax vectors, at most sqrt 2.

    Golatkar et al. 2021 and Chundawat et al. 2023; usually against the retrained model, on the
    forget and the retain set apart.
    """
    return float(_by_rows(first, second, lambda p, q: (p.exp() - q.exp()).norm(dim=1)).mean())


def completeness(first: Tensor, second: Tensor) -> float:
    """Share of samples for which both models name the same class; 1 is full agreement.

    Usually against the retrained model. Of equal largest logits the first counts.
    """
    agree = _by_rows(first, second, lambda p, q: (p.argmax(1) == q.argmax(1)).double())
    return float(agree.mean())
