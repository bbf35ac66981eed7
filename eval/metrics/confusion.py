"""What images of the forgotten classes are taken for, by the head or by their neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, sum_over_ranks
from letheon.errors import NotMeasurable
from letheon.eval.metrics.knn import knn
from letheon.eval.metrics.registry import NAMES, SHARE, metric
from letheon.eval.outputs import Outputs

if TYPE_CHECKING:
    from letheon.eval.case import Case

OTHERS = "other classes"
_SCHEMA = {
    "type": "object",
    "required": ["rows", "columns", "shares"],
    "properties": {
        "rows": NAMES,
        "columns": NAMES,
        "shares": {"type": "array", "items": {"type": "array", "items": SHARE}},
    },
}


def by_head(test: Outputs, forgotten: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Make the table of `confusion` for the predictions of the model's own head."""
    rows = torch.isin(test.labels, torch.tensor(forgotten))
    said, labels = test.logits[rows].argmax(dim=1), test.labels[rows]
    return confusion(said, labels, forgotten, names, most=8, ranks=test.ranks)


def by_neighbors(
    train: Outputs,
    test: Outputs,
    forgotten: Sequence[int],
    names: Sequence[str],
    k: int = 5,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Make the table of `confusion` for k-NN (cosine, pooled features) among all training images.

    Training images of the forgotten classes are in the database: where the representation still
    knows a class, its neighbors say so, whatever the head does.
    """
    rows = torch.isin(test.labels, torch.tensor(forgotten))
    labels = test.labels[rows]
    total = train.span()[1]
    if not len(test.gather(labels)):
        raise NotMeasurable("got no test image of a forgotten class; expected at least one")
    if k > total:
        raise NotMeasurable(f"got {total} training images; expected at least k = {k}")
    votes = knn(
        train.features, train.labels, test.features[rows], labels, (k,), ranks=ranks,
        names=("the training set", "the test images of the forgotten classes"),
    )  # fmt: skip
    said = votes.predictions[k].cpu()
    return confusion(said, labels, forgotten, names, most=8, ranks=test.ranks)


def confusion(
    predictions: Tensor,
    labels: Tensor,
    forgotten: Sequence[int],
    names: Sequence[str],
    most: int = 8,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Compute the shares of what each forgotten class is called.

    Args:
        predictions: (n,) int64 predicted classes.
        labels: (n,) int64 true classes, each among `forgotten`.
        forgotten: class numbers, one line of the table each.
        names: of all classes.
        most: columns for classes that are not forgotten, the most named first; the rest is summed.
        ranks: the job, whose ranks hold the other samples and must call; default: none.

    Returns:
        "rows": names of the forgotten classes that have images; "columns": names; "shares": a list
        of shares that sum to 1 for each row.
    """
    table = torch.zeros(len(names), len(names), dtype=torch.int64)
    table.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)
    sum_over_ranks([table], ranks or Ranks())
    lines = [c for c in forgotten if int(table[c].sum())]
    named = table.sum(dim=0)
    others = [c for c in range(len(names)) if c not in set(forgotten) and int(named[c])]
    others = sorted(others, key=lambda c: (-int(named[c]), c))[:most]
    shown = [*lines, *others]
    shares = table[lines].double() / table[lines].sum(dim=1, keepdim=True)
    rest = (1 - shares[:, shown].sum(dim=1)).clamp(min=0)
    columns = [names[c] for c in shown]
    cells = shares[:, shown]
    if bool((rest > 1e-12).any()):
        columns, cells = [*columns, OTHERS], torch.cat([cells, rest[:, None]], dim=1)
    return {"rows": [names[c] for c in lines], "columns": columns, "shares": cells.tolist()}


@metric(
    "head_confusion", title="Head confusion", group="Representation and probes", unit="table",
    needs=("whole classes", "test", "depth full"), everywhere=True, place=24, schema=_SCHEMA,
)  # fmt: skip
def head_confusion(case: Case) -> dict[str, Any]:
    """Shares of what the model's head calls the test images of each forgotten class."""
    return by_head(case.test, case.peers.forgotten, case.peers.names)


@metric(
    "knn_confusion", title="k-NN confusion", group="Representation and probes", unit="table",
    needs=("whole classes", "test", "depth full"), everywhere=True, place=25, schema=_SCHEMA,
)  # fmt: skip
def knn_confusion(case: Case) -> dict[str, Any]:
    """Shares of what the 5 nearest training images in feature space call the test images of each
    forgotten class.
    """
    names = case.peers.names
    train, forgotten = case.true_train, case.peers.forgotten
    return by_neighbors(train, case.test, forgotten, names, k=5, ranks=case.ranks)
