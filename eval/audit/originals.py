"""The spread of originals: models trained on everything by other seeds, which forgot nothing.

Two trainings on the same images differ, often by more than a method moves its model (arXiv
2510.26714). A number therefore counts as a sign of forgetting only where it tells such originals
from the retrained models, and only as far as it leaves the former for the latter. Everything is
read from rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from letheon.eval.audit.false_positives import LEAST, deviations, tolerance
from letheon.eval.metrics.reference import Row, mean_row
from letheon.eval.metrics.registry import metrics
from letheon.eval.report.definitions import define, format_value

PLACES = ("retrained", "originals", "neither", "both")
"""Whose prediction interval holds a number."""
SHOWN = ("cka_original", "closer_to_retrained", "margin_distance", "FA")
"""Numbers that the table shows by themselves, where they are there."""


def select_originals(rows: Sequence[Row]) -> list[Row]:
    """Select the originals; the first without the numbers that would compare it with itself."""
    originals = [row for row in rows if row["role"] == "original"]
    own = {k for m in metrics().values() if "original" in m.needs for k in m.keys}
    first = [{k: v for k, v in row.items() if k not in own} for row in originals[:1]]
    return [*first, *originals[1:]]


def _inside(row: Row, others: Sequence[Row]) -> dict[str, bool]:
    """Key -> whether the number lies in the prediction interval of the others, itself aside."""
    away = deviations(row, others)
    return {key: abs(value) <= tolerance(count) for key, (value, count) in away.items()}


def telling_keys(originals: Sequence[Row], retrained: Sequence[Row]) -> list[str]:
    """List the numbers of which neither side's mean lies in the other side's interval."""
    first = _inside({"name": "", **mean_row(originals)}, retrained)
    second = _inside({"name": "", **mean_row(retrained)}, originals)
    return [key for key in first if key in second and not (first[key] or second[key])]


def place_numbers(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """Key -> one of `PLACES`, of the numbers that tell originals from retrained models.

    Args:
        row: of any model; where it is an original or a retrained one, it is left out of these.
        rows: of the table; {} where it has fewer than three originals or retrained models.
    """
    of_both = {other["name"]: other for other in select_originals(rows)}
    row = of_both.get(row["name"], row)
    all_retrained = [other for other in rows if other["role"] == "retrained"]
    if min(len(of_both), len(all_retrained)) < LEAST:
        return {}
    originals = [other for name, other in of_both.items() if name != row["name"]]
    retrained = [other for other in all_retrained if other["name"] != row["name"]]
    before, after = _inside(row, originals), _inside(row, retrained)
    places = {(True, True): "both", (True, False): "retrained", (False, True): "originals"}
    return {
        key: places.get((after[key], before[key]), "neither")
        for key in telling_keys(originals, retrained)
        if key in before and key in after
    }


def describe_places(row: Row, rows: Sequence[Row]) -> str:
    """Count where the numbers place a model, in a sentence; nothing without several originals."""
    placed = list(place_numbers(row, rows).values())
    if not placed:
        return ""
    count = sum(other["role"] == "original" for other in rows)
    near, far, apart, both = (placed.count(place) for place in PLACES)
    return (
        f"of {len(placed)} numbers that tell {count} originals from the retrained models {near} "
        f"place it with the retrained, {far} with the originals, {apart} with neither"
        + (f", {both} with both" if both else "")
    )


def list_places(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table: where the numbers place each model; none without any."""
    placed = {row["name"]: place_numbers(row, rows) for row in rows}
    if not any(placed.values()):
        return
    keys = [key for key in SHOWN if any(row.get(key) is not None for row in rows)]
    heads = [f"with {place}" for place in PLACES[:2]] + list(PLACES[2:])
    heads += [define(key).title for key in keys]
    yield f"| model | {' | '.join(heads)} |"
    yield f"|---|{'---:|' * len(heads)}"
    for row in rows:
        places = placed[row["name"]]
        counts = [str(list(places.values()).count(place)) for place in PLACES]
        cells = (
            format_value(key, row.get(key)) + (f" ({places[key]})" if key in places else "")
            for key in keys
        )
        yield f"| {row['name']} | {' | '.join([*counts, *cells])} |"
