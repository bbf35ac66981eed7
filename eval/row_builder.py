"""Build the rows of a table: every metric of a model, or the reason why it is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from letheon.engine.distributed import Ranks, gather_objects, own_items, share_out
from letheon.errors import LetheonError, NotMeasurable, RunFailed
from letheon.eval.attacks.suite import Attack
from letheon.eval.case import Case
from letheon.eval.inference.sampling import MOST
from letheon.eval.membership.over_seeds import SeveralRuns
from letheon.eval.metrics.registry import Metric, metrics
from letheon.eval.probes.information import BALANCED
from letheon.eval.probes.linear import SHOTS
from letheon.eval.probes.relearn_evaluator import Relearning
from letheon.progress import Items
from letheon.spans import span

Depth = Literal["quick", "full"]


@dataclass
class Row:
    """One model of a table."""

    name: str
    role: str = "unlearned"  # original, retrained, control, unlearned
    seed: int | None = None
    classes: tuple[str, ...] = ()  # names of all classes
    forgotten: tuple[int, ...] = ()  # class numbers; empty where single samples were forgotten
    conditions: dict[str, Any] = field(default_factory=dict)  # with digests of the weights
    limits: dict[str, Any] = field(default_factory=dict)  # of samples, in a full evaluation
    values: dict[str, Any] = field(default_factory=dict)
    """Metric -> number, table, or None; shares are fractions."""
    why: dict[str, str] = field(default_factory=dict)  # metric -> why it is None
    doubts: list[str] = field(default_factory=list)  # what makes these numbers worth less

    def as_dict(self) -> dict[str, Any]:
        """Flatten to what JSON holds: the metrics stand beside the name."""
        row: dict[str, Any] = {"name": self.name, "role": self.role, "seed": self.seed}
        row |= {"classes": list(self.classes), "forgotten": list(self.forgotten)} | self.values
        row |= {"conditions": self.conditions, "why": self.why}
        row |= {"doubts": self.doubts} if self.doubts else {}
        return row | ({"audit": self.limits} if self.limits else {})

    def add(self, metric: Metric, compute: Callable[[], Any]) -> None:
        """Compute a metric and enter its value, or None and the reason.

        Raises:
            RunFailed: a number that is not finite, or what `compute` raises.
        """
        try:
            result = compute()
        except NotMeasurable as error:
            result = dict.fromkeys(("", *metric.parts), error) if metric.parts else error
        except LetheonError:
            raise
        except Exception as error:
            if not metric.plugin:
                raise
            result = NotMeasurable(
                f"metric plug-in {metric.plugin} failed: {type(error).__name__}: {error}"
            )
            result = dict.fromkeys(("", *metric.parts), result) if metric.parts else result
        if metric.parts:
            for suffix, value in result.items():
                self._enter(metric.key + suffix, value)
        else:
            self._enter(metric.key, result)

    def _enter(self, key: str, value: Any) -> None:
        if isinstance(value, NotMeasurable):
            self.why[key] = str(value)
            value = None
        elif isinstance(value, Mapping):
            missing = {k: v for k, v in value.items() if isinstance(v, NotMeasurable)}
            self.why |= {f"{key} {name}": str(reason) for name, reason in missing.items()}
            value = {**value, **dict.fromkeys(missing)}
        _check_finite(value, f"{key} of {self.name}")
        self.values[key] = value


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_finite(item, f"{name} in {where}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_finite(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RunFailed(f"got {value} for {where}; expected a finite number")


@span("statistics")
def build_row(
    case: Case, depth: Depth = "quick", row: Row | None = None, line: Items | None = None
) -> Row:
    """Compute the metrics of one model.

    Args:
        case: the model beside its peers; `case.ranks` is the job, of which every rank must call.
            Each rank holds its share of the samples; what one rank computes of gathered numbers is
            shared out.
        depth: quick leaves out the metrics that need "depth full".
        row: with name, role and seed; is completed.
        line: shows the metric in hand, of those that this rank computes.

    Returns:
        The row, the same on every rank.

    Raises:
        RunFailed: numbers that are not finite, on every rank.
        InputError: sets that differ between the models.
    """
    row = row or Row(case.passes.name)
    row.classes, row.forgotten = case.peers.names, case.peers.forgotten
    row.conditions = _conditions(case)
    wanted = [
        metric
        for metric in metrics().values()
        if metric.stage == "model" and (depth == "full" or "depth full" not in metric.needs)
        if "canaries" not in metric.needs or case.peers.canaries  # asked only where they are
    ]

    groups: dict[Any, list[Metric]] = {}  # what shares a computation is computed on one rank
    for metric in wanted:
        if not (metric.plugin or metric.everywhere):
            groups.setdefault(metric.reads or metric.key, []).append(metric)
    shared = {metric.key for group in groups.values() for metric in group}
    line = line or Items("", 1, speaks=False)
    line.start(row.name)
    own_groups = own_items(len(groups), case.ranks)
    pieces = len(wanted) - len(shared) + len(own_groups)

    def add(metric: Metric, to: Row) -> None:
        def compute() -> Any:
            case.require(metric.needs)
            return metric(case)

        to.add(metric, compute)

    for metric in wanted:
        if metric.key in shared:
            _gather(metric, case)
            continue
        line.show(metric.title, pieces)
        add(metric, row)
        if metric.plugin:
            _require_equal(metric, row, case.ranks)

    def compute(group: list[Metric]) -> tuple[dict[str, Any], dict[str, str]]:
        line.show(group[0].title, pieces)
        own = Row(row.name)
        for metric in group:
            add(metric, own)
        return own.values, own.why

    for values, why in share_out(list(groups.values()), compute, case.ranks):
        row.values |= values
        row.why |= why
    order = [key for metric in wanted for key in metric.keys]
    row.values = {key: row.values[key] for key in order if key in row.values}
    if depth == "full":
        row.limits = {"membership_rows": MOST, "few_shot": SHOTS}
        if BALANCED in case.passes.outputs:
            row.limits["information_rows"] = case.passes.outputs[BALANCED].span()[1]
    line.finish()
    return row


def _gather(metric: Metric, case: Case) -> None:
    """Do what every rank takes part in; what cannot be measured is told by the metric."""
    if metric.gathers is None:
        return
    with suppress(NotMeasurable):
        case.require(metric.needs)
        case.once(metric.gathers)


def _require_equal(metric: Metric, row: Row, ranks: Ranks) -> None:
    """Leave a plug-in's values out where the ranks have different ones: it read its share alone."""
    values = {key: row.values.get(key) for key in metric.keys}
    if any(other != values for other in gather_objects(values, ranks)):
        for key in metric.keys:
            row.values[key] = None
            row.why[key] = (
                f"metric plug-in {metric.plugin} gave other values on other ranks, each of which "
                "holds its share of the samples; sum over the ranks of the outputs, or evaluate on "
                "one rank"
            )


def _conditions(case: Case) -> dict[str, Any]:
    """List what the row was measured under, with the digests of the weights."""
    of, peers = case.conditions, case.peers
    return {
        "ks": list(of.ks),
        "metric": of.metric,
        "weights": of.weights,
        "temperature": of.temperature if of.weights == "temperature" else None,
        "space": of.space,
        "split": of.split,
        "cka": of.cka,
        "digest": case.passes.weights,
        "original": peers.original.passes.weights if peers.original else None,
        "retrained": peers.retrained[0].passes.weights if peers.retrained else None,
        "samples": {key: outputs.span()[1] for key, outputs in case.passes.outputs.items()},
    }


@span("statistics")
def add_stage(row: Row, inputs: SeveralRuns | Relearning | Attack) -> None:
    """Compute the metrics of a later stage and enter them.

    Args:
        row: is completed.
        inputs: what the metrics of that stage read.
    """
    stages: dict[type, str] = {SeveralRuns: "runs", Relearning: "relearning", Attack: "attacks"}
    stage = stages[type(inputs)]
    for metric in metrics().values():
        if metric.stage == stage:
            row.add(metric, lambda metric=metric: metric(inputs))  # type: ignore[misc]
