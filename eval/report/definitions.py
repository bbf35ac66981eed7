"""Look up a metric's definition by its key, its place in a table and its printed form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from letheon.eval.metrics.registry import IDEALS, OTHER, Definition, Metric, Summary, metrics

_UNKNOWN = "No definition is on file for this number."


class _Definitions(NamedTuple):
    """The keys of all metrics, each looked up once: a page asks thousands of times."""

    catalog: dict[str, Metric]  # of which this is
    owners: dict[str, Metric]
    """Key -> metric, for parts such as cka_original_forget too, in the reports' order."""
    known: dict[str, Definition]


_definitions = _Definitions({}, {}, {})


def _find_definitions() -> _Definitions:
    global _definitions
    catalog = metrics()
    if _definitions.catalog is not catalog:
        owners = {key: metric for metric in catalog.values() for key in metric.keys}
        _definitions = _Definitions(catalog, owners, {})
    return _definitions


def define(key: str) -> Definition:
    """Return the definition of a metric, or of a part of one (cka_original_forget).

    A number that nobody defined has its key as title and says so.
    """
    of = _find_definitions()
    if key not in of.owners:
        return Definition(key, OTHER, "score", "", _UNKNOWN)
    if key not in of.known:
        of.known[key] = of.owners[key].definition(key)
    return of.known[key]


def define_all() -> Iterator[str]:
    """Yield one line a metric: its key, its definition and its ideal, in the reports' order."""
    for key, metric in metrics().items():
        of = metric.definition(key)
        yield " ".join([f"{key}: {of.text}", IDEALS.get(of.better, "No value is better.")])


def order(keys: Iterable[str]) -> list[str]:
    """Sort the keys, each once, into the reports' order; unknown ones last."""
    places = {key: place for place, key in enumerate(_find_definitions().owners)}
    return sorted(set(keys), key=lambda key: (places.get(key, len(places)), key))


def summary_columns() -> list[tuple[str, Summary]]:
    """List (key, column) of the short table, in its order."""
    columns = [pair for metric in metrics().values() for pair in metric.summaries()]
    return sorted(columns, key=lambda pair: pair[1].place)


def format_value(key: str, value: float | None) -> str:
    """Format a value for a reader: shares in per cent with two decimals; a dash for None."""
    if value is None:
        return "–"
    unit = define(key).unit
    if unit == "share":
        return f"{100 * value:.2f}"
    digits = {"steps": 0, "seconds": 1}.get(unit, 3)
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def format_title(key: str) -> str:
    """Format a column's head: the metric, a dagger where the formula is unverified, its unit."""
    of = define(key)
    unit = " %" if of.unit == "share" else {"nats": " (nats)", "seconds": " (s)"}.get(of.unit, "")
    return of.title + ("†" if of.unverified else "") + unit
