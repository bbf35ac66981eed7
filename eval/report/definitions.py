"""From a metric's key to its definition, its place in a table and its printed form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from letheon.eval.report.catalogue import CATALOGUE

OTHER = "Other"
GROUPS = (*CATALOGUE, OTHER)


class Definition(NamedTuple):
    """One metric: what it is called, measured in, and what is better."""

    title: str
    group: str
    unit: str  # share (printed in per cent), score, nats, steps, seconds
    better: str  # "as retrained", "high", "low", "50 %", "1" or "" where it is context
    text: str


_KNOWN = {
    key: Definition(title, group, unit, better, text)
    for group, metrics in CATALOGUE.items()
    for key, (title, unit, better, text) in metrics.items()
}
_PARTS = {
    "_forget": (" (forget)", " On the held-out images of the forgotten classes only."),
    "_retain": (" (retain)", " On the held-out images of the other classes only."),
    "_floor": (" (floor)", " With the rows of one model shuffled: what unrelated features reach."),
    "_unbiased": (" (unbiased)", " With the unbiased estimator: about 0 for unrelated features."),
}


def _whole(key: str) -> tuple[str, str] | None:
    """(metric, suffix) of a part such as cka_original_forget; None for anything else."""
    for suffix in _PARTS:
        if key.endswith(suffix) and key.removesuffix(suffix) in _KNOWN:
            return key.removesuffix(suffix), suffix
    return None


def define(key: str) -> Definition:
    """The definition of a metric, or of a part of one (cka_original_forget).

    A number that nobody defined keeps its key as title and says so.
    """
    if key in _KNOWN:
        return _KNOWN[key]
    part = _whole(key)
    if part is None:
        return Definition(key, OTHER, "score", "", "No definition is on file for this number.")
    of, (title, text) = _KNOWN[part[0]], _PARTS[part[1]]
    return of._replace(title=of.title + title, better="", text=of.text + text)


def ordered(keys: Iterable[str]) -> list[str]:
    """The keys, each once, in the catalogue's order; parts after their whole, unknown ones last."""
    place = {key: number for number, key in enumerate(_KNOWN)}

    def rank(key: str) -> tuple[int, str, str]:
        part = _whole(key)
        if key in place:
            return place[key], "", key
        return (place[part[0]], part[1], key) if part else (len(place), "", key)

    return sorted(set(keys), key=rank)


def printed(key: str, value: float | None) -> str:
    """A value for a reader: shares in per cent with two decimals; a dash where there is none."""
    if value is None:
        return "–"
    unit = define(key).unit
    if unit == "share":
        return f"{100 * value:.2f}"
    digits = {"steps": 0, "seconds": 1}.get(unit, 3)
    return f"{value:.{digits}f}"
