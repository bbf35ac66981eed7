"""Evaluation as the published code of this benchmark does it, written anew for timing.

One inference pass for accuracy, another for the k-NN features (the logits), a third for CKA, in
which both networks run again; scikit-learn's k-NN on the CPU; one biased CKA a batch (the pass
order and settings follow Kim et al. 2025's public code).
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from letheon.loaders.batch import Loader


@torch.no_grad()
def field_accuracy(model: nn.Module, loader: Loader, chosen: list[int]) -> float:
    """Mean of the batches' accuracies, weighted by their size, with a host sync a batch."""
    right, seen = 0.0, 0
    for batch in loader.sweep(chosen):
        logits, _ = model(batch.images)
        share = (logits.argmax(1) == batch.labels).float().mean().item()
        right, seen = right + share * len(batch.labels), seen + len(batch.labels)
    return right / seen


@torch.no_grad()
def field_knn(model: nn.Module, loader: Loader, chosen: list[int] | None, thin: float) -> float:
    """5-NN of logits in scikit-learn, 80/20 by torch's generator; `thin` of the 80 % is kept."""
    rows, labels = [], []
    for batch in loader.sweep(chosen):
        rows.append(model(batch.images)[0].numpy())
        labels.append(batch.labels.numpy())
    x, y = np.concatenate(rows), np.concatenate(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2)).numpy()
    first = int(0.8 * len(x))
    kept, asked = order[: int(thin * first)], order[first:]
    found = KNeighborsClassifier(5, metric="cosine").fit(x[kept], y[kept])
    return float(found.score(x[asked], y[asked]))


@torch.no_grad()
def field_cka(a: nn.Module, b: nn.Module, loader: Loader, chosen: list[int]) -> float:
    """The mean over batches of each batch's biased CKA, from centred Gram matrices."""
    values = []
    for batch in loader.sweep(chosen):
        values.append(field_batch_cka(a(batch.images)[1], b(batch.images)[1]).item())
    return float(np.mean(values))


def field_batch_cka(x: Tensor, y: Tensor) -> Tensor:
    """tr(KHLH) / sqrt(tr(KHKH) tr(LHLH)) with H made anew for each term, n^3 products."""
    n = len(x)
    k, el = x @ x.T, y @ y.T

    def hsic(first: Tensor, second: Tensor) -> Tensor:
        h = torch.eye(n) - torch.ones(n, n) / n
        return torch.trace(first @ h @ second @ h)

    return hsic(k, el) / (hsic(k, k) * hsic(el, el)).sqrt()
