"""What forgotten classes are taken for, against scikit-learn's confusion matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier

from letheon.errors import NotMeasurable
from letheon.eval.metrics.confusion import OTHERS, by_head, by_neighbors
from letheon.eval.outputs import Outputs

NAMES = [f"class {c}" for c in range(20)]


def outputs(n: int, seed: int) -> Outputs:
    draw = np.random.default_rng(seed)
    labels = torch.from_numpy(draw.integers(0, 20, n))
    features = torch.from_numpy(draw.normal(size=(n, 20))).float()
    features[torch.arange(n), labels] += 2
    return Outputs(features, features * 1.5, labels, labels < 2, torch.arange(n))


def test_shares_are_those_of_the_confusion_matrix() -> None:
    train, test = outputs(300, 0), outputs(200, 1)
    forgotten = [1, 0]
    oracle = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
    oracle.fit(train.features.double(), train.labels)
    near = oracle.predict(test.features.double())
    tables = {
        "head": (by_head(test, forgotten, NAMES), test.logits.numpy().argmax(1)),
        "neighbours": (by_neighbors(train, test, forgotten, NAMES), near),
    }
    for table, said in tables.values():
        matrix = confusion_matrix(test.labels, said, labels=range(20), normalize="true")
        assert table["rows"] == ["class 1", "class 0"]
        assert table["columns"][:2] == ["class 1", "class 0"]
        assert len(table["columns"]) <= 11
        for line, name in zip(table["shares"], table["rows"], strict=True):
            assert sum(line) == pytest.approx(1)
            for share, column in zip(line, table["columns"], strict=True):
                if column != OTHERS:
                    assert share == matrix[NAMES.index(name), NAMES.index(column)]


def test_no_image_of_a_forgotten_class_is_refused() -> None:
    with pytest.raises(NotMeasurable, match="no test image"):
        by_neighbors(outputs(50, 0), outputs(50, 1), [], NAMES)
