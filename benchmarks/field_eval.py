"""Evaluation as the published code of this benchmark does it, written anew for timing.

One inference pass for accuracy, another for the k-NN features (the logits), a third for CKA, each
decoding the files again; scikit-learn's k-NN on the CPU; one biased CKA a batch of 512 (the pass
order and settings follow Kim et al. 2025's public code).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from baseline_data import Loaded
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from letheon.loaders.preset import Preset

BATCH = 512


def field_loader(folder: Path, preset: Preset, chosen: Sequence[int]) -> Loaded:
    """ImageFolder, Pillow and ToTensor, in this process; images in name order."""
    size = preset.size
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    steps.append(transforms.Normalize(preset.mean, preset.std))
    images = ImageFolder(str(folder), transforms.Compose(steps))
    return DataLoader(Subset(images, chosen), batch_size=BATCH)


@torch.no_grad()
def field_accuracy(model: nn.Module, loader: Loaded) -> float:
    """Mean of the batches' accuracies, weighted by their size, with a host sync a batch."""
    right, seen = 0.0, 0
    for images, labels in loader:
        share = (model(images)[0].argmax(1) == labels).float().mean().item()
        right, seen = right + share * len(labels), seen + len(labels)
    return right / seen


@torch.no_grad()
def field_knn(model: nn.Module, loader: Loaded, thin: float) -> float:
    """5-NN of logits in scikit-learn, 80/20 by torch's generator; `thin` of the 80 % is kept."""
    rows, truth = [], []
    for images, labels in loader:
        rows.append(model(images)[0].numpy())
        truth.append(labels.numpy())
    x, y = np.concatenate(rows), np.concatenate(truth)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2)).numpy()
    first = int(0.8 * len(x))
    kept, asked = order[: max(5, int(thin * first))], order[first:]
    found = KNeighborsClassifier(5, metric="cosine").fit(x[kept], y[kept])
    return float(found.score(x[asked], y[asked]))


@torch.no_grad()
def field_features(model: nn.Module, loader: Loaded) -> list[Tensor]:
    """The pooled features of each batch, to be kept for `field_cka`."""
    return [model(images)[1] for images, _ in loader]


@torch.no_grad()
def field_cka(model: nn.Module, other: nn.Module | list[Tensor], loader: Loaded) -> float:
    """The mean over batches of each batch's biased CKA; `other` runs again, or was kept."""
    values = []
    for number, (images, _) in enumerate(loader):
        theirs = other(images)[1] if isinstance(other, nn.Module) else other[number]
        values.append(field_batch_cka(model(images)[1], theirs).item())
    return float(np.mean(values))


def field_batch_cka(x: Tensor, y: Tensor) -> Tensor:
    """tr(KHLH) / sqrt(tr(KHKH) tr(LHLH)) with H made anew for each term, n^3 products."""
    n = len(x)
    k, el = x @ x.T, y @ y.T

    def hsic(first: Tensor, second: Tensor) -> Tensor:
        h = torch.eye(n) - torch.ones(n, n) / n
        return torch.trace(first @ h @ second @ h)

    return hsic(k, el) / (hsic(k, k) * hsic(el, el)).sqrt()
