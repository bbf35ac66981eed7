"""What a frozen network still knows: probes on its features, its confusions, its weights' move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from letheon.errors import InputError
from letheon.eval.checks import Floats, Ints, Numbers, classes, matrix
from letheon.kernels.keyed import hash_keys


class Probe(NamedTuple):
    """Held-out accuracy of a classifier fitted to frozen features; shares in [0, 1]."""

    forgotten: float  # over held-out samples of the forgotten classes: their recovery
    retained: float | None  # over the others; None where there are none
    per_class: dict[int, float]  # classes with held-out samples


def few_shot(labels: Ints, shots: int, seed: int) -> NDArray[np.int64]:
    """Positions of `shots` samples of each class, increasing; all of a class that has fewer.

    Which ones depends on (seed, position) only.
    """
    position = torch.arange(len(labels))
    keys = hash_keys(seed, "few-shot", 0, position, 1)[:, 0].numpy()
    order = np.lexsort((keys, labels))
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(first, counts)
    return np.sort(order[place < shots])


def linear_probe(
    train: Numbers,
    train_labels: Numbers,
    test: Numbers,
    test_labels: Numbers,
    forgotten: Numbers,
    *,
    solver: Literal["logistic", "ridge"] = "logistic",
    strength: float = 1.0,
    shots: int | None = None,
    seed: int = 0,
) -> Probe:
    """Fit a linear classifier to frozen features of all classes, forgotten ones among them.

    An encoder that has forgotten a class no more than its head has gives it back here. Compare
    `forgotten` with the retrained model's, whose features may separate a class never seen.
    Features are centred and scaled by the training features; a constant one is left at zero.

    Args:
        train: (n, D) features of training samples, forget set included.
        train_labels: (n,) their classes.
        test: (m, D) features of held-out samples.
        test_labels: (m,) their classes.
        forgotten: (k,) class numbers.
        solver: multinomial logistic regression, or one-against-all ridge regression, which stays
            affordable for many classes and samples.
        strength: of the L2 penalty; for "logistic" the inverse of scikit-learn's C.
        shots: samples of each class to train with; None takes all.
        seed: of the few-shot choice.

    Raises:
        InputError: shapes that do not fit, NaN, a single training class, no forgotten class among
            the training or the held-out samples.
    """
    inside, outside = matrix(train, "training features"), matrix(test, "held-out features")
    known = classes(train_labels, "training labels", len(inside))
    asked = classes(test_labels, "held-out labels", len(outside))
    wanted = classes(forgotten, "forgotten classes")
    if inside.shape[1] != outside.shape[1]:
        raise InputError(
            f"got features of widths {inside.shape[1]} and {outside.shape[1]}; expected one width"
        )
    if shots is not None:
        chosen = few_shot(known, shots, seed)
        inside, known = inside[chosen], known[chosen]
    of_forgotten = np.isin(asked, wanted)
    if len(np.unique(known)) < 2 or not np.isin(known, wanted).any() or not of_forgotten.any():
        raise InputError(
            "got no forgotten class on a side of the probe, or a single class to train with; "
            "expected training and held-out samples of forgotten and of other classes"
        )
    mean, spread = inside.mean(axis=0), inside.std(axis=0)
    spread[spread <= 1e-12 * (1 + np.abs(mean))] = np.inf
    fitted = (
        LogisticRegression(C=1 / strength, max_iter=2000)
        if solver == "logistic"
        else RidgeClassifier(alpha=strength)
    ).fit((inside - mean) / spread, known)
    right: NDArray[np.bool_] = fitted.predict((outside - mean) / spread) == asked
    return Probe(
        forgotten=float(right[of_forgotten].mean()),
        retained=float(right[~of_forgotten].mean()) if (~of_forgotten).any() else None,
        per_class={int(c): float(right[asked == c].mean()) for c in np.unique(asked)},
    )


def confusion(logits: Tensor, labels: Tensor, forgotten: Numbers) -> Floats:
    """(k, C) what each forgotten class is called now: shares of predictions, each row sums to 1.

    Args:
        logits: (n, C).
        labels: (n,) true classes.
        forgotten: (k,) class numbers, one a row, in that order.

    Raises:
        InputError: a forgotten class without samples, logits that are not finite.
    """
    table = matrix(logits, "logits")
    truth = classes(labels, "labels", len(table))
    named = table.argmax(axis=1)
    rows = []
    for wanted in classes(forgotten, "forgotten classes"):
        own = named[truth == wanted]
        if not len(own):
            raise InputError(
                f"got no samples of forgotten class {wanted}; expected at least one; "
                "leave the class out or give a set that has it"
            )
        rows.append(np.bincount(own, minlength=table.shape[1]) / len(own))
    return np.stack(rows)


class Moved(NamedTuple):
    """How far one tensor of the weights lies from the other model's."""

    l2: float
    relative: float  # l2 over the norm of the second model's tensor; inf where that is zero


def weight_distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Moved]:
    """Layer-wise Euclidean distance of two state dicts' floating-point tensors, in float64.

    Usually against the retrained model. Two networks that compute the same may lie far apart
    (their units can be permuted), so this compares runs from one initialisation only.

    Raises:
        InputError: other names or shapes; the text lists the names.
    """
    odd = sorted(set(first) ^ set(second))
    odd += [n for n in first if n in second and first[n].shape != second[n].shape]
    if odd:
        raise InputError(
            f"got state dicts that differ in {', '.join(odd[:8])}; expected one architecture"
        )
    result = {}
    for name, values in first.items():
        if values.is_floating_point():
            other = second[name].detach().double().cpu()
            l2 = float((values.detach().double().cpu() - other).norm())
            size = float(other.norm())
            result[name] = Moved(l2, l2 / size if size > 0 else (0.0 if l2 == 0 else float("inf")))
    return result
