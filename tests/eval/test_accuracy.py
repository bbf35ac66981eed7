"""Accuracies are whole counts over exactly the samples they name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix

from letheon.errors import RunFailed
from letheon.eval.metrics.accuracy import Count, forgetting, per_class, top1
from letheon.eval.outputs import Outputs


def outputs(n: int, classes: int = 4, seed: int = 0, forget: int | None = 1) -> Outputs:
    draw = np.random.default_rng(seed)
    logits = torch.from_numpy(draw.normal(size=(n, classes)).round(1)).float()  # with equal logits
    labels = torch.from_numpy(draw.integers(0, classes, n))
    marked = labels == forget if forget is not None else torch.zeros(n, dtype=torch.bool)
    return Outputs(torch.zeros(n, 2), logits, labels, marked, torch.arange(n))


def test_top1_is_sklearns() -> None:
    out = outputs(203)
    said = out.logits.numpy().argmax(axis=1)
    count = top1(out)
    assert count == Count(accuracy_score(out.labels, said, normalize=False), 203)
    assert count.share == accuracy_score(out.labels, said)


def test_the_four_accuracies_split_both_sets_without_rest() -> None:
    train, test = outputs(301, seed=1), outputs(97, seed=2)
    four = forgetting(train, test)
    for part, whole in (("FA", train), ("TFA", test)):
        chosen = whole.forget.numpy()
        said = whole.logits.numpy().argmax(axis=1)
        right = (said == whole.labels.numpy())[chosen]
        assert four[part] == (right.sum(), len(right))
    assert four["FA"].total + four["RA"].total == 301
    assert four["FA"].correct + four["RA"].correct == top1(train).correct
    assert four["TFA"].total + four["TRA"].total == 97


def test_per_class_is_the_diagonal_of_the_confusion_matrix() -> None:
    out = outputs(150, classes=6)
    matrix = confusion_matrix(out.labels, out.logits.argmax(1), labels=range(6))
    got = per_class(out, 6)
    assert [count.correct for count in got] == matrix.diagonal().tolist()
    assert [count.total for count in got] == matrix.sum(axis=1).tolist()


def test_a_set_without_samples_has_no_share() -> None:
    out = outputs(20, forget=None)
    assert top1(out, out.forget) == (0, 0)
    assert top1(out, out.forget).share is None
    assert top1(outputs(0)).share is None
    assert per_class(outputs(5, classes=3), 7)[6].share is None


def test_logits_that_are_not_numbers_are_refused() -> None:
    out = outputs(20)
    out.logits[3, 1] = float("nan")
    with pytest.raises(RunFailed, match="NaN logits for 1 of 20"):
        top1(out)
