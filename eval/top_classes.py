"""Rankings by the original network that forget requests name: nearest classes, hardest samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.eval.outputs import Outputs


class Shares(NamedTuple):
    """Sums of the answers to the images of each downstream class; those of several parts add up."""

    sums: Tensor  # (K, C) int64: probabilities in units of 2^-40, so that no order of a sum matters
    counts: Tensor  # (K,) int64


_UNIT = 2.0**40


def sum_shares(outputs: Outputs) -> Shares:
    """Sum the original's probabilities over the images of each downstream class.

    Args:
        outputs: the original's answers to some images, labels of the downstream set.
    """
    shares = (F.softmax(outputs.logits.double(), dim=1) * _UNIT).round().to(torch.int64)  # (n, C)
    counts = torch.bincount(outputs.labels)
    sums = torch.zeros(len(counts), shares.shape[1], dtype=torch.int64)
    return Shares(sums.index_add_(0, outputs.labels, shares), counts)


def rank_classes(parts: Sequence[Shares]) -> list[int]:
    """Rank upstream class ids by how near a downstream set they are, each once.

    For every downstream class the original network's mean softmax over that class's images ranks
    the upstream classes. First come the best of each downstream class, by how strongly it is
    predicted, then the second choices, and so on. (The published "top" lists look made like this,
    but their recipe is not published: this is our reading.)

    Args:
        parts: `sum_shares` of all images of all domains, which share their classes.
    """
    classes = max(len(part.counts) for part in parts)
    sums = torch.zeros(classes, parts[0].sums.shape[1], dtype=torch.int64)
    counts = torch.zeros(classes, dtype=torch.int64)
    for part in parts:
        sums[: len(part.counts)] += part.sums
        counts[: len(part.counts)] += part.counts
    means = sums[counts > 0] / _UNIT / counts[counts > 0, None]  # (downstream, C) float64
    order = means.argsort(dim=1, descending=True, stable=True)  # (downstream, C)
    ranking: dict[int, None] = {}
    for choice in range(order.shape[1]):
        best = order[:, choice]  # (downstream,)
        strength: Tensor = means.gather(1, best[:, None])[:, 0]
        for row in strength.argsort(descending=True, stable=True).tolist():
            ranking.setdefault(int(best[row]))
    return list(ranking)


def rate_hardness(outputs: Outputs, score: str) -> Tensor:
    """(n,) float64: how hard the original finds each sample.

    Args:
        outputs: the original's answers to some training images.
        score: ``loss``, the cross-entropy of the label; or ``confidence``, the probability of the
            network's own answer, negated.
    """
    logits = outputs.logits.double()
    if score == "loss":
        return F.cross_entropy(logits, outputs.labels, reduction="none")
    return -F.softmax(logits, dim=1).amax(1)


def rank_samples(hardness: Sequence[Tensor]) -> list[int]:
    """Rank sample numbers by how hard the original finds them, the hardest first; ties by number.

    (Worst-case forget sets by loss: Fan et al. 2024, "Challenging forgets", who search for theirs;
    a ranking by the original is the simple form.)

    Args:
        hardness: `rate_hardness` of all training images, in order.
    """
    return torch.cat([*hardness]).argsort(descending=True, stable=True).tolist()
