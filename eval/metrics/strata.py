"""Forget images by stratum: how well the original had memorized them, their class, their group.

A mean over the forget set hides whom a model remembers: what is left is mostly left of images that
were learned by heart (Zhao et al. 2024, "What makes unlearning hard"). Everything is read from
stored outputs. Single numbers of a stratum are compared with the retrained models' in the audit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from letheon.engine.distributed import sum_over_ranks
from letheon.errors import NotMeasurable
from letheon.eval.membership.sides import select_logits
from letheon.eval.membership.signals import confidence, gather_signal, margin
from letheon.eval.metrics.registry import SHARE, metric
from letheon.eval.outputs import Outputs

if TYPE_CHECKING:
    from letheon.eval.case import Case

THIRDS = ("most memorized", "middle", "least memorized")
_STRATUM = {
    "type": "object",
    "required": ["images", "accuracy", "confidence"],
    "properties": {
        "images": {"type": "integer", "minimum": 1}, "accuracy": SHARE, "confidence": SHARE,
    },
}  # fmt: skip


def thirds(original: Outputs) -> Tensor:
    """(n,) int64 third of each forget image of this rank: 0 where the original is least sure.

    By the margin of the label, which orders as its probability does and has no ties at 1. Every
    rank must call.
    """
    own = select_logits(original, original.forget)
    start, count = own.span()
    order = gather_signal(own, margin).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(count)
    return place[start : start + len(own)] * len(THIRDS) // count


def _measure(train: Outputs, which: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Accuracy and confidence on the forget images of each stratum that has any.

    Args:
        train: of the model; every rank must call.
        which: (n,) int64 stratum of each forget image of this rank.
        names: of the strata.
    """
    logits, labels = train.logits[train.forget], train.labels[train.forget]
    ones = torch.ones(len(labels), dtype=torch.float64)
    sure = confidence(logits, labels) if len(labels) else ones
    parts = (ones, (logits.argmax(dim=1) == labels).double(), sure)
    sums = torch.stack(
        [torch.zeros(len(names), dtype=torch.float64).index_add_(0, which, p) for p in parts]
    )
    sum_over_ranks([sums], train.ranks)
    return {
        name: {
            "images": int(count),
            "accuracy": right / count,
            "confidence": min(1.0, sure / count),
        }
        for name, (count, right, sure) in zip(names, sums.T.tolist(), strict=True)
        if count
    }


def _kinds(case: Case) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """Yield each way to divide the forget images: its name, the strata of this rank's, names."""
    train, peers = case.train, case.peers
    if peers.original is not None:
        yield "memorization", thirds(peers.original.passes.outputs["train"]), THIRDS
    classes = peers.names or tuple(map(str, range(train.logits.shape[1])))
    yield "class", case.true_train.labels[train.forget], classes
    if peers.groups:
        names = tuple(sorted(set(peers.groups)))
        place = {name: number for number, name in enumerate(names)}
        of = [place[peers.groups[int(number)]] for number in train.index[train.forget]]
        yield "group", torch.tensor(of, dtype=torch.int64), names


@metric(
    "strata", title="Forget accuracy by stratum", group="Accuracy", unit="table", everywhere=True,
    place=11,
    schema={
        "type": "object",
        "additionalProperties": {"type": "object", "additionalProperties": _STRATUM},
    },
)  # fmt: skip
def strata(case: Case) -> Mapping[str, Any]:
    """Accuracy on the forget images, and mean probability of their label, by stratum: by thirds of
    the original's probability of the label (where it is least sure an image was memorized, if it is
    right at all), by class (that it shows, of a canary), and by group where groups were named.
    """
    if not int(case.train.gather(case.train.forget).sum()):
        raise NotMeasurable("no samples")
    return {kind: _measure(case.train, which, names) for kind, which, names in _kinds(case)}
