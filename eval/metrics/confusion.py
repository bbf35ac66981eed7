"""What images of the forgotten classes are taken for, by the head or by their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.errors import InputError
from letheon.eval.inference.extract import Outputs
from letheon.eval.metrics.knn import knn

OTHERS = "other classes"


def by_head(test: Outputs, forgotten: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """The table of `confusion` for the predictions of the model's own head."""
    rows = torch.isin(test.labels, torch.tensor(forgotten))
    return confusion(test.logits[rows].argmax(dim=1), test.labels[rows], forgotten, names)


def by_neighbours(
    train: Outputs,
    test: Outputs,
    forgotten: Sequence[int],
    names: Sequence[str],
    k: int = 5,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """The table of `confusion` for k-NN (cosine, pooled features) among all training images.

    Training images of the forgotten classes are in the database: where the representation still
    knows a class, its neighbours say so, whatever the head does.
    """
    rows = torch.isin(test.labels, torch.tensor(forgotten))
    labels = test.labels[rows]
    if not len(labels):
        raise InputError("got no test image of a forgotten class; expected at least one")
    asked = test.features[rows]
    found = knn(
        train.features, train.labels, asked, labels, (k,), ranks=ranks,
        names=("the training set", "the test images of the forgotten classes"),
    )  # fmt: skip
    return confusion(found.predictions[k].cpu(), labels, forgotten, names)


def confusion(
    said: Tensor, labels: Tensor, forgotten: Sequence[int], names: Sequence[str], most: int = 8
) -> dict[str, Any]:
    """Shares of what each forgotten class is called.

    Args:
        said: (n,) int64 predicted classes.
        labels: (n,) int64 true classes, each among `forgotten`.
        forgotten: class numbers, one line of the table each.
        names: of all classes.
        most: columns for classes that are not forgotten, the most named first; the rest is summed.

    Returns:
        "rows": names of the forgotten classes that have images; "columns": names; "shares": a list
        of shares that sum to 1 for each row.
    """
    table = torch.zeros(len(names), len(names), dtype=torch.int64)
    table.index_put_((labels, said), torch.ones_like(labels), accumulate=True)
    lines = [c for c in forgotten if int(table[c].sum())]
    named = table.sum(dim=0)
    kept = [c for c in range(len(names)) if c not in set(forgotten) and int(named[c])]
    kept = sorted(kept, key=lambda c: (-int(named[c]), c))[:most]
    shown = [*lines, *kept]
    shares = table[lines].double() / table[lines].sum(dim=1, keepdim=True)
    rest = (1 - shares[:, shown].sum(dim=1)).clamp(min=0)
    columns = [names[c] for c in shown]
    cells = shares[:, shown]
    if bool((rest > 1e-12).any()):
        columns, cells = [*columns, OTHERS], torch.cat([cells, rest[:, None]], dim=1)
    return {"rows": [names[c] for c in lines], "columns": columns, "shares": cells.tolist()}
