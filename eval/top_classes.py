"""Rankings by the original network that forget requests name: nearest classes, hardest samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.eval.outputs import Outputs


def rank_classes(domains: Sequence[Outputs]) -> list[int]:
    """Rank upstream class ids by how near a downstream set they are, each once.

    For every downstream class the original network's mean softmax over that class's images ranks
    the upstream classes. First come the best of each downstream class, by how strongly it is
    predicted, then the second choices, and so on. (The published "top" lists look made like this,
    but their recipe is not published: this is our reading.)

    Args:
        domains: the original network's answers to the images of each downstream domain, with the
            downstream labels; the domains share their classes.
    """
    shares = torch.cat([F.softmax(domain.logits.double(), dim=1) for domain in domains])  # (n, C)
    labels = torch.cat([domain.labels for domain in domains])  # (n,)
    means = torch.stack([shares[labels == c].mean(0) for c in labels.unique()])
    order = means.argsort(dim=1, descending=True, stable=True)  # (downstream, C)
    ranking: dict[int, None] = {}
    for choice in range(order.shape[1]):
        best = order[:, choice]  # (downstream,)
        strength: Tensor = means.gather(1, best[:, None])[:, 0]
        for row in strength.argsort(descending=True, stable=True).tolist():
            ranking.setdefault(int(best[row]))
    return list(ranking)


def rank_samples(outputs: Outputs, score: str) -> list[int]:
    """Rank sample numbers by how hard the original finds them, the hardest first.

    Ties go by number. (Worst-case forget sets by loss: Fan et al. 2024, "Challenging forgets",
    who search for theirs; a ranking by the original is the simple form.)

    Args:
        outputs: the original's answers to the training images, all on this rank.
        score: ``loss``, the cross-entropy of the label, highest first; or ``confidence``, the
            probability of the network's own answer, lowest first.
    """
    logits = outputs.logits.double()
    if score == "loss":
        hardness = F.cross_entropy(logits, outputs.labels, reduction="none")  # (n,)
    else:
        hardness = -F.softmax(logits, dim=1).amax(1)
    return outputs.index[hardness.argsort(descending=True, stable=True)].tolist()
