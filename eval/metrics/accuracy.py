"""Top-1 accuracy as whole numbers: how many were right, of how many.

FA and RA are measured on training images under the test transform, TFA and TRA on held-out ones
(Jia et al. 2023; Fan et al. 2024). Nothing is averaged over batches, so no batch size, padding or
number of ranks enters.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from letheon.engine.distributed import sum_over_ranks
from letheon.errors import NotMeasurable, RunFailed
from letheon.eval.metrics.registry import SHARE, Summary, metric
from letheon.eval.outputs import Outputs

if TYPE_CHECKING:
    from letheon.eval.case import Case


class Count(NamedTuple):
    """`correct` of `total` samples."""

    correct: int
    total: int

    @property
    def share(self) -> float | None:
        """Between 0 and 1; None where there are no samples."""
        return self.correct / self.total if self.total else None


def _is_right(outputs: Outputs) -> Tensor:
    """(n,) bool: the largest logit is the label's (the first of equal ones counts as largest)."""
    parts = [part.max(dim=1) for part in outputs.logits.split(8192)]  # NaN where a row has any
    broken = torch.tensor([sum(int(part.values.isnan().sum()) for part in parts), len(outputs)])
    sum_over_ranks([broken], outputs.ranks)
    if int(broken[0]):
        raise RunFailed(
            f"got NaN logits for {int(broken[0])} of {int(broken[1])} samples; expected numbers; "
            "the model has diverged: lower its learning rate"
        )
    if len(outputs) == 0:
        return torch.zeros(0, dtype=torch.bool)
    return torch.cat([part.indices for part in parts]) == outputs.labels


def top1(outputs: Outputs, where: Tensor | None = None, right: Tensor | None = None) -> Count:
    """Count top-1 hits over the samples of all ranks with `where` (n,) bool; default all.

    Args:
        outputs: of this rank; every rank must call.
        where: samples of this rank.
        right: (n,) bool: the hits, where they are known already.

    Raises:
        RunFailed: logits that are not numbers, on every rank.
    """
    right = _is_right(outputs) if right is None else right
    rows = torch.ones_like(right) if where is None else where
    both = torch.tensor([int((right & rows).sum()), int(rows.sum())])
    sum_over_ranks([both], outputs.ranks)
    return Count(*both.tolist())


def per_class(outputs: Outputs, classes: int, where: Tensor | None = None) -> list[Count]:
    """Count top-1 hits of each true class, in class order; a class without samples has total 0."""
    right = _is_right(outputs)
    rows = torch.ones_like(right) if where is None else where
    correct = torch.bincount(outputs.labels[right & rows], minlength=classes)
    total = torch.bincount(outputs.labels[rows], minlength=classes)
    sum_over_ranks([correct, total], outputs.ranks)
    return [Count(*pair) for pair in zip(correct.tolist(), total.tolist(), strict=True)]


def forgetting(train: Outputs, test: Outputs) -> dict[str, Count]:
    """Count FA, RA on the training set, TFA, TRA on the test set."""
    right = {"train": _is_right(train), "test": _is_right(test)}
    return {
        "FA": top1(train, train.forget, right["train"]),
        "RA": top1(train, ~train.forget, right["train"]),
        "TFA": top1(test, test.forget, right["test"]),
        "TRA": top1(test, ~test.forget, right["test"]),
    }


ACCURACIES = ("FA", "RA", "TFA", "TRA")


def counts(case: Case) -> dict[str, Count]:
    """`forgetting` of one model; test images that are training images count as none."""
    found = forgetting(case.train, case.test)
    return found | (
        dict.fromkeys(("TFA", "TRA"), Count(0, 0)) if case.peers.nothing_held_out else {}
    )


def _share(case: Case, name: str) -> float:
    share = case.once(counts)[name].share
    if share is None:
        raise NotMeasurable("no samples")
    return share


@metric(
    "FA", title="FA", group="Accuracy", unit="share", better="as retrained", everywhere=True,
    source="Jia et al. 2023, 'Model Sparsity Can Simplify Machine Unlearning'", place=1,
    summary=Summary("FA %", "accuracy on the forget set", 1),
)  # fmt: skip
def forget_accuracy(case: Case) -> float:
    """Top-1 accuracy on the training images to be forgotten, under the test transform; exact
    count; 1 - UA.
    """
    return _share(case, "FA")


@metric(
    "RA", title="RA", group="Accuracy", unit="share", better="as retrained", everywhere=True,
    source="Jia et al. 2023", place=2,
    summary=Summary("RA %", "accuracy on the retain set", 2),
)  # fmt: skip
def retain_accuracy(case: Case) -> float:
    """Top-1 accuracy on the training images to be kept, under the test transform; exact count."""
    return _share(case, "RA")


@metric(
    "TFA", title="TFA", group="Accuracy", unit="share", better="as retrained", needs=("test",),
    everywhere=True, source="Kim et al. 2025, 'Are We Truly Forgetting?'", place=3,
    summary=Summary("TFA %", "accuracy on test images of the forgotten classes", 3),
)  # fmt: skip
def test_forget_accuracy(case: Case) -> float:
    """Top-1 accuracy on held-out images of the forgotten classes; exact count."""
    return _share(case, "TFA")


@metric(
    "TRA", title="TRA", group="Accuracy", unit="share", better="as retrained", needs=("test",),
    everywhere=True, source="Kim et al. 2025", place=4,
    summary=Summary("TRA %", "accuracy on test images of the other classes", 4),
)  # fmt: skip
def test_retain_accuracy(case: Case) -> float:
    """Top-1 accuracy on held-out images of the classes kept, which is what TA means for class-wise
    forgetting; exact count.
    """
    return _share(case, "TRA")


@metric(
    "UA", title="UA", group="Accuracy", unit="share", better="as retrained", everywhere=True,
    source="Jia et al. 2023", place=5,
)  # fmt: skip
def unlearning_accuracy(case: Case) -> float:
    """Unlearning accuracy, 1 - FA."""
    return 1 - _share(case, "FA")


@metric(
    "gap", title="Accuracy gap", group="Distance to the retrained models", unit="share",
    better="low", needs=("reference",), everywhere=True, place=1,
    source="Fan et al. 2024, 'SalUn', average gap, there with an attack in place of TFA",
    summary=Summary(
        "gap %", "mean distance of FA, RA, TFA, TRA to the retrained model, in points", 5
    ),
)  # fmt: skip
def accuracy_gap(case: Case) -> float:
    """Mean absolute difference to the retrained model over FA, RA, TFA and TRA, in percentage
    points.
    """
    ours, reference = case.once(counts), case.reference.passes.outputs
    other = forgetting(reference["train"], reference["test"])
    pairs = [(ours[name].share, other[name].share) for name in ACCURACIES]
    differences = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    if not differences:
        raise NotMeasurable("no samples")
    return fmean(differences)


@metric("counts", title="Counts", group="Accuracy", unit="table", everywhere=True, place=8,
        schema={"type": "object"})  # fmt: skip
def accuracy_counts(case: Case) -> dict[str, list[int]]:
    """Right answers and images behind FA, RA, TFA and TRA: [correct, total] of each."""
    return {name: list(count) for name, count in case.once(counts).items()}


@metric(
    "earlier", title="Accuracy on earlier requests", group="Accuracy", unit="table",
    everywhere=True, place=10,
    schema={"type": "object", "additionalProperties": SHARE},
)  # fmt: skip
def earlier_accuracy(case: Case) -> dict[str, float | None]:
    """Top-1 accuracy on the training images that a model of the table was made to forget before
    this request, by request; they are no part of RA. Compare it with the retrained model's.
    """
    if not case.earlier:
        raise NotMeasurable("no model of the table forgot anything earlier")
    return {text: top1(outputs).share for text, outputs in case.earlier.items()}


@metric(
    "accuracy_by_class", title="Accuracy by class", group="Accuracy", unit="table",
    needs=("test",), everywhere=True, place=9,
    schema={"type": "array", "items": SHARE},
)  # fmt: skip
def accuracy_by_class(case: Case) -> list[Any]:
    """Top-1 accuracy on the test images of each class, in class order."""
    return [count.share for count in per_class(case.test, case.test.logits.shape[1])]
