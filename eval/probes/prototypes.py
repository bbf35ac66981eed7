"""Class means as a head: what a few images, or all, bring back without any training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.distributed import sum_over_ranks
from letheon.errors import NotMeasurable
from letheon.eval.metrics.registry import metric
from letheon.eval.outputs import Outputs
from letheon.eval.probes.linear import SHOTS, few_shot

if TYPE_CHECKING:
    from letheon.eval.case import Case


def class_means(train: Outputs, rows: Tensor) -> Tensor:
    """(C, D) float64 means of the features with `rows` (n,) bool, over all ranks; NaN where none.

    Every rank must call.
    """
    count = train.logits.shape[1]
    features, labels = train.features[rows].double(), train.labels[rows]
    sums = torch.zeros(count, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, features)
    sizes = torch.bincount(labels, minlength=count).double()
    sum_over_ranks([sums, sizes], train.ranks)
    return sums / sizes[:, None]


def recovery(case: Case, rows: Tensor) -> float:
    """Ask held-out images of the forgotten classes which class mean lies nearest, by cosine.

    Raises:
        NotMeasurable: no image of a forgotten class on either side.
    """
    means = class_means(case.true_train, rows)
    known = ~means.isnan().any(dim=1)
    gone = torch.tensor(case.peers.forgotten, dtype=torch.int64)
    asked = torch.isin(case.test.labels, gone)
    heads = F.normalize(means.nan_to_num(), dim=1)
    scores = F.normalize(case.test.features[asked].double(), dim=1) @ heads.T
    scores[:, ~known] = -torch.inf
    right = scores.argmax(dim=1) == case.test.labels[asked] if len(scores) else asked[:0]
    both = torch.tensor([int(right.sum()), int(asked.sum())])
    sum_over_ranks([both], case.test.ranks)
    if not int(both[1]) or not bool(known[gone].any()):
        raise NotMeasurable("got no image of a forgotten class on a side; expected some on both")
    return int(both[0]) / int(both[1])


_GROUP = "Attacks"


@metric(
    "attack_prototype", title="Prototype attack", group=_GROUP, unit="share",
    better="as retrained", needs=("whole classes", "test", "depth full"), everywhere=True, place=1,
    source="after Spotter 2026",
)  # fmt: skip
def attack_prototype(case: Case) -> float:
    """Held-out accuracy on the forgotten classes when the mean features of 5 of their images stand
    beside the kept classes' means, and the nearest by cosine is named; no training.
    """
    train = case.true_train
    gone = torch.tensor(case.peers.forgotten, dtype=torch.int64)
    labels = train.gather(train.labels)
    few = torch.from_numpy(few_shot(np.asarray(labels.numpy()), SHOTS))
    picked = torch.zeros(len(train), dtype=torch.bool)
    picked[train.local_rows(few)] = True
    return recovery(case, picked | ~torch.isin(train.labels, gone))


@metric(
    "attack_class_means", title="Class-mean head", group=_GROUP, unit="share",
    better="as retrained", needs=("whole classes", "test", "depth full"), everywhere=True, place=2,
    source="after CMF 2026",
)  # fmt: skip
def attack_class_means(case: Case) -> float:
    """Held-out accuracy on the forgotten classes when the head is replaced by the mean features of
    all training images of each class, the nearest by cosine.
    """
    return recovery(case, torch.ones(len(case.train), dtype=torch.bool))
