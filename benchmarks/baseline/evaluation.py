"""The baseline's evaluation: a pass for accuracy, one for k-NN, one of two networks for CKA."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torchvision.datasets import ImageFolder

from baseline.data import Images, Loaded, test_transform
from baseline.model import Hook, Normalized, load
from letheon.eval.metrics.knn_splits import split
from letheon.spans import span, waits

CKA_BATCH = 512


@torch.no_grad()
def accuracy(model: Normalized, loader: Loaded, device: torch.device) -> float:
    """Top-1 with a host sync a batch; batches weighted by their size."""
    model.eval()
    right = seen = 0.0
    for images, target in waits("data", loader):
        images, target = images.to(device), target.to(device)
        share = (model(images).argmax(1) == target).float().mean().item()
        right, seen = right + share * len(target), seen + len(target)
    return right / seen


@torch.no_grad()
def knn(model: Normalized, loader: Loaded, device: torch.device) -> float:
    """5-NN by cosine in scikit-learn; 80/20 by torch's generator with seed 2.

    Fixed: of pooled features (the last published version has logits), images in sorted order.
    """
    hook, rows, labels = Hook(model), [], []
    for images, target in waits("data", loader):
        model(images.to(device))
        rows.append(hook.features.cpu().numpy())
        labels.append(target.numpy())
    hook.remove()
    with span("statistics"):
        x, y = np.concatenate(rows), np.concatenate(labels)
        cut = split(len(x), "legacy")
        database, queries = cut.database.numpy(), cut.queries.numpy()
        model_of_rows = KNeighborsClassifier(5, metric="cosine").fit(x[database], y[database])
        return float(model_of_rows.score(x[queries], y[queries]))


@torch.no_grad()
def cka(model: Normalized, other: Normalized, loader: Loaded, device: torch.device) -> float:
    """The mean over batches of each batch's biased linear CKA; both networks run again."""
    hooks, values = (Hook(model), Hook(other)), []
    for images, _ in waits("data", loader):
        images = images.to(device)
        model(images)
        other(images)
        with span("statistics"):
            values.append(batch_cka(hooks[0].features, hooks[1].features).item())
    for hook in hooks:
        hook.remove()
    return fmean(values)


def batch_cka(x: Tensor, y: Tensor) -> Tensor:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) from centerd Gram matrices, in float64."""
    center = torch.eye(len(x), dtype=torch.float64, device=x.device) - 1 / len(x)
    k, el = x.double() @ x.double().T, y.double() @ y.double().T

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ center @ b @ center)

    return hsic(k, el) / (hsic(k, k) * hsic(el, el)).sqrt()


def evaluate(
    weights: Path,
    retrained: Path,
    images: Images,
    domains: Path,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """The row of one model; the network is read anew for each metric, as published."""
    row: dict[str, float] = {}
    with span("evaluation"):
        parts = images.parts()
        model = load(weights, device)
        for name, data in parts.items():
            loader = images.in_order(data, batch_size)
            row[name] = accuracy(model, loader, device)
        shares = []
        for folder in sorted(p for p in domains.iterdir() if p.is_dir()):
            model = load(weights, device)
            data = ImageFolder(str(folder), test_transform(images.preset))
            shares.append(knn(model, images.in_order(data, batch_size), device))
        row["knn"] = fmean(shares)
        model, other = load(weights, device), load(retrained, device)
        for name, key in (("TFA", "cka_retrained_forget"), ("TRA", "cka_retrained_retain")):
            loader = images.in_order(parts[name], CKA_BATCH)
            row[key] = cka(model, other, loader, device)
    return row
