"""Per-sample signals of membership, computed from logits in float64.

Each is defined row by row: no value depends on the other samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.outputs import Outputs


def _check(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Finite (n, C) float64 logits, C >= 2, and (n, 1) labels within [0, C)."""
    if logits.ndim == 2 and len(logits) == 0 == len(labels):
        raise NotMeasurable("got no samples; expected at least one")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(
            f"got logits of shape {tuple(logits.shape)}; expected samples x classes, "
            "at least two classes"
        )
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"got labels of shape {tuple(labels.shape)} and type {labels.dtype}; "
            f"expected {logits.shape[0]} whole class numbers"
        )
    if not bool(torch.isfinite(logits).all()):
        raise RunFailed(
            "got logits with NaN or infinity; expected finite numbers; the model diverged"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise InputError(
            f"got labels from {low} to {high} for {logits.shape[1]} classes; "
            f"expected 0 to {logits.shape[1] - 1}"
        )
    return logits.double(), labels.long()[:, None]


def gather_signal(of: Outputs, signal: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(n,) float64 signal of the samples of all ranks, in index order, on every rank.

    Each rank computes its own; all must call.

    Raises:
        NotMeasurable: no sample on any rank.
        RunFailed: logits that are not finite.
    """
    own = torch.zeros(0, dtype=torch.float64)
    values = of.gather(signal(of.logits, of.labels) if len(of) else own)
    if not len(values):
        raise NotMeasurable("got no samples; expected at least one")
    return values


def _others(logits: Tensor, column: Tensor) -> Tensor:
    """(n,) log-sum-exp of all logits but the one in `column` (n, 1)."""
    return logits.scatter(1, column, -torch.inf).logsumexp(1)


def log_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) log p(y|x), at most 0."""
    logits, column = _check(logits, labels)
    return logits.log_softmax(1).gather(1, column)[:, 0]


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) p(y|x), in [0, 1]."""
    return log_confidence(logits, labels).exp()


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) cross-entropy -log p(y|x) in nats."""
    return -log_confidence(logits, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) log p_y - log(1 - p_y) = z_y - logsumexp of the other logits, without cancellation.

    The logit-scaled confidence of LiRA (Carlini et al. 2022) and the margin of KLOM (Rinberg et
    al. 2025) are this one number.
    """
    logits, column = _check(logits, labels)
    return logits.gather(1, column)[:, 0] - _others(logits, column)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) -sum_i p_i log p_i in nats, in [0, log C]; the labels are only checked."""
    logits, _ = _check(logits, labels)
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def correctness(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) 1 where the largest logit (the first of equal ones) is the label's, else 0."""
    logits, column = _check(logits, labels)
    return (logits.argmax(1) == column[:, 0]).double()


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i), in nats.

    Song and Mittal 2021 ("Systematic Evaluation of Privacy Risks of Machine Learning Models").
    log(1 - p) of the likeliest class is taken from the other logits, so that a certain model gives
    a large number and not infinity.
    """
    logits, column = _check(logits, labels)
    lse = logits.logsumexp(1, keepdim=True)  # (n, 1)
    log_p = logits - lse  # (n, C)
    top = logits.argmax(1, keepdim=True)
    log_rest = torch.log1p(-log_p.exp().clamp(max=0.5))  # (n, C); right for all but the top class
    log_rest = log_rest.scatter(1, top, _others(logits, top)[:, None] - lse)
    terms = log_p.exp() * log_rest
    label_term = torch.expm1(log_p) * log_p  # (n, C) -(1 - p) log p, with the sign of the sum: >= 0
    return label_term.gather(1, column)[:, 0] - terms.scatter(1, column, 0.0).sum(1)


SIGNALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "confidence": confidence,
    "entropy": entropy,
    "correctness": correctness,
    "modified entropy": modified_entropy,
}
"""SVC-efficacy's features of one number, by name; the fifth is `probabilities`."""


def probabilities(logits: Tensor) -> Tensor:
    """(n, C) float64 softmax of logits."""
    return logits.double().softmax(1)
