"""Register metrics: one decorator holds all that tables, reports, `--define` and the schema say.

A metric is a function whose docstring is its definition; nothing else in this package repeats it:

    @metric("my_score", title="My score", group="Accuracy", better="high", source="Doe 2026")
    def my_score(case: Case) -> float:
        \"\"\"Share of forget images that ...\"\"\"

Ours are found in the modules of `metrics`, `membership` and `probes`; those of other packages by
entry points of the group `letheon.metrics`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypedDict, Unpack

from letheon.choices import check_choices, refuse_choice
from letheon.errors import InputError

Unit = Literal["share", "score", "nats", "steps", "seconds", "table"]
"""share: a fraction, printed in per cent; table: what pictures are drawn from, no column."""
Better = Literal["as retrained", "high", "low", "50 %", "0", "1", ""]
"""Which values are good; "" for context."""
IDEALS: Mapping[Better, str] = {
    "as retrained": "Best when equal to the retrained models'.",
    "high": "Larger is better.",
    "low": "Smaller is better.",
    "50 %": "Best at 50 %, chance.",
    "0": "Best at 0; further from it on either side is worse.",
    "1": "Best at 1.",
}
"""What each direction means, for a reader."""
Need = Literal[
    "original", "reference", "retrained", "untrained", "test", "held-out", "downstream",
    "whole classes", "canaries",
    "depth full", "several runs", "relearning",
]  # fmt: skip
"""What a metric cannot do without.

- ``original``: the model before forgetting.
- ``reference``: the first retrained model; ``retrained``: one besides the model itself.
- ``untrained``: a network with new weights.
- ``test``: test images that are not the training images.
- ``held-out``: test images of the forgotten classes; ``whole classes``: no single samples.
- ``downstream``: images of another set.
- ``canaries``: training images under a planted label.
- ``depth full``: computed in a full evaluation only.
- ``several runs``: runs of the method, and retrained models, that differ by the seed.
- ``relearning``: relearn curves.
"""
Stage = Literal["model", "runs", "relearning", "attacks", "scores"]
"""When a metric is computed, and what its function is given.

- ``model``: a `Case`, one model beside the others.
- ``runs``: a `SeveralRuns`, when the rows of all models are there.
- ``relearning``: a `Relearning`, on one rank.
- ``attacks``: an `Attack`, on one rank.
- ``scores``: two rows, the model's and the retrained models' mean (or the original's).
"""

GROUPS = (
    "Distance to the retrained models",
    "Accuracy",
    "Membership inference",
    "Canaries",
    "Attacks",
    "Representation and probes",
    "Weights",
    "Output distributions",
    "Cost",
)
"""Tables of a report in their order; groups of plug-ins follow."""
OTHER = "Other"
"""The group of numbers that nobody defined."""
SHARE: Mapping[str, Any] = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
"""JSON schema of a fraction of 1; the pieces that follow are those of tables."""
NUMBERS_BY_NAME: Mapping[str, Any] = {
    "type": "object", "additionalProperties": {"type": ["number", "null"]},
}  # fmt: skip
SHARES_BY_NAME: Mapping[str, Any] = {"type": "object", "additionalProperties": SHARE}
NAMES: Mapping[str, Any] = {"type": "array", "items": {"type": "string"}}
_FAMILIES = (
    "letheon.eval.metrics", "letheon.eval.membership", "letheon.eval.probes",
    "letheon.eval.attacks",
)  # fmt: skip
_UNVERIFIED = "Our reading: the published formula could not be read; unverified."


@dataclass(frozen=True)
class Summary:
    """A column of the short table."""

    head: str
    legend: str  # one line
    place: int  # columns are in this order


@dataclass(frozen=True)
class Part:
    """A variant of a metric whose key has a suffix, such as `cka_original_forget`."""

    title: str  # is appended to the metric's
    sentence: str  # is appended to its definition
    summary: Summary | None = None


class Facts(TypedDict, total=False):
    """What the decorator is given besides the key."""

    title: str
    group: str
    unit: Unit
    better: Better
    needs: tuple[Need, ...]
    source: str  # author and year
    stage: Stage
    reads: Callable[..., Any] | None
    """A computation that several metrics share; one rank computes all of them."""
    gathers: Callable[..., Any] | None
    """What every rank takes part in before one computes the metric: each holds its share of the
    samples. The function gathers the numbers or rows that are needed, and the metric reads them
    with `case.once`."""
    everywhere: bool
    """Computed on every rank at the same time, each from its own samples, with sums over ranks."""
    parts: Mapping[str, Part]
    """Suffix -> part; the function then returns {suffix: value}, with "" for the metric itself."""
    summary: Summary | None
    verified: bool  # False: the published formula could not be read
    place: int  # within its group
    schema: Mapping[str, Any]  # JSON schema of a table


@dataclass(frozen=True)
class Definition:
    """What tables, reports and the schema say of one key."""

    title: str
    group: str
    unit: Unit
    better: Better  # "" where it is context
    text: str
    unverified: bool = False


@dataclass(frozen=True)
class Metric:
    """A metric: its function and its entry. Calling it calls the function."""

    key: str
    function: Callable[..., Any]
    title: str = ""
    group: str = OTHER
    unit: Unit = "score"
    better: Better = ""
    needs: tuple[Need, ...] = ()
    source: str = ""
    stage: Stage = "model"
    reads: Callable[..., Any] | None = None
    gathers: Callable[..., Any] | None = None
    everywhere: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict)
    summary: Summary | None = None
    verified: bool = True
    place: int = 1000
    schema: Mapping[str, Any] = field(default_factory=dict)
    plugin: str = ""  # entry point that brought it; "" for ours

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Compute the metric."""
        return self.function(*inputs, **options)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the metric and of its parts."""
        return (self.key, *(self.key + suffix for suffix in self.parts))

    def definition(self, key: str) -> Definition:
        """Return the definition of one of `keys`."""
        words = [" ".join(inspect.cleandoc(self.function.__doc__ or "").split())]
        part = self.parts.get(key.removeprefix(self.key))
        words += [part.sentence] if part else []
        words += [f"Source: {self.source}."] if self.source else []
        words += [] if self.verified else [_UNVERIFIED]
        title = self.title + (part.title if part else "")
        better: Better = "" if part else self.better
        text = " ".join(words)
        return Definition(title, self.group, self.unit, better, text, not self.verified)

    def summaries(self) -> Iterator[tuple[str, Summary]]:
        """Yield (key, column) of the short table."""
        if self.summary is not None:
            yield self.key, self.summary
        for suffix, part in self.parts.items():
            if part.summary is not None:
                yield self.key + suffix, part.summary


def metric(key: str, **facts: Unpack[Facts]) -> Callable[[Callable[..., Any]], Metric]:
    """Make a metric of a function; its docstring is the definition.

    Args:
        key: under which the value stands in a row.
        **facts: the fields of `Facts`.

    Raises:
        InputError: a function without a docstring, an unknown fact, or one of an unknown value.
    """

    def decorate(function: Callable[..., Any]) -> Metric:
        if not (function.__doc__ or "").strip():
            raise InputError(f"got metric {key} without a docstring; expected its definition there")
        if unknown := facts.keys() - Facts.__annotations__.keys():
            raise refuse_choice(sorted(unknown)[0], Facts.__annotations__)
        entry = Metric(key, function, **{"title": key, **facts})  # type: ignore[arg-type]
        check_choices(entry)
        return entry

    return decorate


@cache
def metrics() -> dict[str, Metric]:
    """Return every metric by key, ours and those of plug-ins, in the order of the reports.

    A plug-in that cannot be used is named in a warning and left out.
    """
    found: list[Metric] = []
    for family in _FAMILIES:
        package = importlib.import_module(family)
        for module in pkgutil.iter_modules(package.__path__, f"{family}."):
            names = vars(importlib.import_module(module.name)).values()
            found += [each for each in names if isinstance(each, Metric)]
    for point in entry_points(group="letheon.metrics"):
        try:
            found.append(_load_plugin(point, {key for each in found for key in each.keys}))
        except Exception as error:
            warnings.warn(
                f"got metric plug-in {point.name} ({point.value}), which cannot be used: "
                f"{type(error).__name__}: {error}; it is left out",
                stacklevel=2,
            )
    groups = list(dict.fromkeys([*GROUPS, *(each.group for each in found)]))
    found.sort(key=lambda each: (groups.index(each.group), each.place))
    return {each.key: each for each in found}


def _load_plugin(point: EntryPoint, known: set[str]) -> Metric:
    loaded = point.load()
    if not isinstance(loaded, Metric):
        raise InputError(
            "expected a function with the decorator letheon.eval.metrics.registry.metric"
        )
    if known & set(loaded.keys):
        raise InputError(f"its key {loaded.key} is in use; name it otherwise")
    return replace(loaded, plugin=point.name)


def groups() -> tuple[str, ...]:
    """Return the tables of a report in their order, those of plug-ins and `OTHER` last."""
    return tuple(dict.fromkeys([*GROUPS, *(each.group for each in metrics().values()), OTHER]))
