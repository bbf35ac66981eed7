"""Lay out pictures of many models as tables and small plots of the page: a line or a plot each.

A panel a model, as `plots` draws it, costs half a second and a page's height for every ten models.
Here a number is a cell whose color tells it too, and a model's points are an SVG path: a hundred
models take milliseconds, no name is cut, and a reader can search, sort and copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from letheon.eval.metrics.confusion import OTHERS
from letheon.eval.report.plots import GREY, Look

Row = dict[str, Any]
Values = Mapping[Any, float | None]  # by column; a column that is absent is not known


class Cell(NamedTuple):
    """A number as it is printed, and the class of its color in page.css."""

    text: str
    color: str = ""


class Line(NamedTuple):
    """A model's cells; `row` is its number in the table, None for a line made of several."""

    row: int | None
    name: str
    cells: Sequence[Cell]


class Grid(NamedTuple):
    """A heat map as a table: a line a model."""

    heads: Sequence[str]
    lines: Sequence[Line]


class Shape(NamedTuple):
    """Points of one look as the data of an SVG path in a field of 128 by 128."""

    look: Look
    path: str


class Plot(NamedTuple):
    """A model's points, classes in the order of the key."""

    row: int
    name: str
    shapes: Sequence[Shape]


class Plots(NamedTuple):
    """A small plot a model, and what the looks mean."""

    key: Sequence[tuple[str, Shape]]
    plots: Sequence[Plot]


def color_share(value: float) -> str:
    """Return the class of a share's color, one of eleven."""
    return f"h{min(max(round(10 * value), 0), 10)}"


def _share(value: float) -> Cell:
    return Cell(f"{round(100 * value):d}", color_share(value))


def _fraction(value: float) -> Cell:
    return Cell(f"{value:.2f}", color_share(value))


def _change(most: float) -> Callable[[float], Cell]:
    def cell(value: float) -> Cell:
        whole = round(100 * value)
        step = round(5 * value / most)
        return Cell(f"{whole:+d}" if whole else "0", f"c{min(max(5 + step, 0), 10)}")

    return cell


def lay_out(
    lines: Sequence[tuple[int | None, str, Values]],
    heads: Mapping[Any, str],
    cell: Callable[[float], Cell] = _share,
) -> Grid:
    """Lay out values: per line its row's number, its name, and what is known by column."""

    def cells_of(values: Values) -> list[Cell]:
        found = (values.get(column) for column in heads)
        return [Cell("–") if v is None or np.isnan(v) else cell(v) for v in found]

    return Grid([*heads.values()], [Line(row, name, cells_of(of)) for row, name, of in lines])


def _mean(values: Sequence[Values]) -> Values:
    """Mean by column; a column that one of them lacks is not known."""
    columns = dict.fromkeys(column for one in values for column in one)
    known = {c: [v for one in values if (v := one.get(c)) is not None] for c in columns}
    return {c: float(np.mean(v)) for c, v in known.items() if len(v) == len(values)}


def _lines(
    shown: Sequence[Row], numbers: Mapping[str, int], values_of: Callable[[Row], Values]
) -> list[tuple[int | None, str, Values]]:
    """One line a row, and behind several retrained models that of their mean."""
    lines: list[tuple[int | None, str, Values]] = []
    retrained: list[Values] = []
    for n, row in enumerate(shown):
        values = values_of(row)
        lines.append((numbers[row["name"]], str(row["name"]), values))
        if row["role"] == "retrained":
            retrained.append(values)
            last = n + 1 == len(shown) or shown[n + 1]["role"] != "retrained"
            if last and len(retrained) > 1:
                lines.append((None, f"retrained, mean of {len(retrained)}", _mean(retrained)))
    return lines


def domain_grid(shown: Sequence[Row], numbers: Mapping[str, int]) -> Grid:
    """A column for each pair of domains: where neighbors are from, and what is tested."""

    def values_of(row: Row) -> Values:
        table = row["domain_matrix"]
        return {(of, on): value for of, cells in table.items() for on, value in cells.items()}

    pairs = dict.fromkeys(pair for row in shown for pair in values_of(row))
    heads = {(of, on): f"{of} → {on}" for of, on in pairs}
    return lay_out(_lines(shown, numbers, values_of), heads)


_COLUMNS = 36  # of all forgotten classes together, if each can have its own name and one other


def confusion_grid(shown: Sequence[Row], numbers: Mapping[str, int]) -> Grid:
    """Columns for each forgotten class: its own name, what it is called most, and all the rest.

    A model whose table sums a name up among others has no number for it; `the rest` is what the
    columns beside it leave of the whole.
    """
    tables = [_confusion(row) for row in shown]
    forgotten = list(dict.fromkeys(of for table in tables for of in table))
    most = max(_COLUMNS // max(len(forgotten), 1) - 2, 0)
    columns = {
        of: _rank_names(of, [table.get(of, {}) for table in tables], most) for of in forgotten
    }
    heads: dict[Any, str] = {}
    for of, names in columns.items():
        heads |= {(of, name): f"{of} → {name}" for name in names}
        heads[of, None] = f"{of} → the rest"

    def values_of(row: Row) -> Values:
        known: dict[Any, float | None] = {}
        for of, shares in _confusion(row).items():
            own = {name: shares.get(name) for name in columns[of]}
            known |= {(of, name): share for name, share in own.items()}
            if None not in shares.values():
                rest = 1 - sum(share for share in own.values() if share is not None)
                known[of, None] = min(max(rest, 0.0), 1.0)
        return known

    return lay_out(_lines(shown, numbers, values_of), heads)


def _confusion(row: Row) -> dict[str, dict[str, float | None]]:
    """Forgotten class -> name -> share."""
    table = row["knn_confusion"]
    lines = zip(table["rows"], table["shares"], strict=True)
    return {of: dict(zip(table["columns"], shares, strict=True)) for of, shares in lines}


def _rank_names(of: str, tables: Sequence[Mapping[str, float | None]], most: int) -> list[str]:
    """The class's own name, then the names that models call it most on average."""
    sums: dict[str, float] = {}
    for table in tables:
        for name, share in table.items():
            sums[name] = sums.get(name, 0.0) + (share or 0.0)
    others = sorted((n for n in sums if n not in (of, OTHERS)), key=lambda n: -sums[n])
    return [of, *others[:most]]


def change_grid(
    changes: Sequence[Sequence[float | None]],
    names: Sequence[str],
    numbers: Mapping[str, int],
    columns: Sequence[str],
) -> Grid:
    """A column a class: change of its accuracy."""
    most = max((abs(v) for change in changes for v in change if v is not None), default=0.01)
    lines = [
        (numbers[name], name, dict(enumerate(change)))
        for name, change in zip(names, changes, strict=True)
    ]
    return lay_out(lines, dict(enumerate(columns)), _change(max(most, 0.01)))


_BOX = ("lowest", "lower quartile", "median", "upper quartile", "highest")


def box_grid(
    sides: Sequence[tuple[Sequence[float], Sequence[float]]],
    names: Sequence[str],
    numbers: Mapping[str, int],
) -> Grid:
    """The numbers of boxes with whiskers: of the forgotten and of the other classes, in points."""
    heads = {(k, n): f"{side}, {what}" for k, side in enumerate(("forgotten", "others"))
             for n, what in enumerate(_BOX)}  # fmt: skip
    lines = []
    for name, both in zip(names, sides, strict=True):
        ends = {k: np.quantile(side, np.linspace(0, 1, 5)) / 100
                for k, side in enumerate(both) if len(side)}  # fmt: skip
        values = {(k, n): float(v) for k, of in ends.items() for n, v in enumerate(of)}
        lines.append((numbers[name], name, values))
    most = max((abs(v) for *_, of in lines for v in of.values()), default=0.01)
    return lay_out(lines, heads, _change(max(most, 0.01)))


def layer_grid(shown: Sequence[Row], numbers: Mapping[str, int]) -> Grid:
    """A column a layer: CKA to the retrained reference; last what unrelated features reach."""
    floors: list[Values] = [r["cka_floor_by_layer"] for r in shown if r.get("cka_floor_by_layer")]
    layers = dict.fromkeys(layer for row in shown for layer in row["cka_by_layer"])
    lines = _lines(shown, numbers, lambda row: dict(row["cka_by_layer"]))
    lines += [(None, "unrelated features", floor) for floor in floors[:1]]
    return lay_out(lines, {layer: layer for layer in layers}, _fraction)


def relearn_grid(shown: Sequence[Row], numbers: Mapping[str, int], recipe: str) -> Grid:
    """A column a step: accuracy on the forgotten classes while relearning by the recipe."""

    def values_of(row: Row) -> Values:
        curve = row["relearn"][recipe]
        return dict(zip(curve["steps"], curve["accuracy"], strict=True))

    steps = sorted({step for row in shown for step in row["relearn"][recipe]["steps"]})
    return lay_out(_lines(shown, numbers, values_of), {step: f"step {step}" for step in steps})


_FIELD = 128
# One point each, from its middle; those without area are drawn by the ends of a stroke.
_MARKS = {
    "o": "h0", "^": "m0-3l3 5h-6z", "D": "m0-3l3 3-3 3-3-3z", "v": "m0 3l3-5h-6z",
    "P": "m-1-3h2v2h2v2h-2v2h-2v-2h-2v-2h2z", "*": "m0-4l1 3h3l-2 2 1 3-3-2-3 2 1-3-2-2h3z",
    "<": "m-3 0l5-3v6z", "h": "m0-3l3 1.5v3l-3 1.5-3-1.5v-3z", ">": "m3 0l-5-3v6z",
}  # fmt: skip
_CONTEXT = Look(GREY, "o")


def draw_shape(places: Any, look: Look) -> Shape:
    """Draw points, (n, 2) whole numbers in the field, as one path; equal places once."""
    spots = np.unique(np.asarray(places, int).reshape(-1, 2), axis=0).tolist()
    mark = _MARKS[look.marker]
    return Shape(look, "".join(f"M{x} {y}{mark}" for x, y in spots))


def cloud_plots(
    shown: Sequence[Row],
    numbers: Mapping[str, int],
    looks: Mapping[int, tuple[str, Look]],
) -> Plots:
    """Draw each model's embedding in a field of its own; `looks` by class number."""
    plots = []
    for row in shown:
        points = np.asarray(row["embedding"]["points"], float).reshape(-1, 2)
        labels = np.asarray(row["embedding"]["labels"])
        low, high = (points.min(0), points.max(0)) if len(points) else (0.0, 1.0)
        inner = (points - low) / np.maximum(np.subtract(high, low), 1e-9)
        inner[:, 1] = 1 - inner[:, 1]  # up is up
        places = np.rint(4 + inner * (_FIELD - 8))
        shapes = [draw_shape(places[labels < 0], _CONTEXT)]
        shapes += [draw_shape(places[labels == c], look) for c, (_, look) in looks.items()]
        plots.append(Plot(numbers[row["name"]], str(row["name"]), shapes))
    middle = [[_FIELD // 2, _FIELD // 2]]
    key = [("others", draw_shape(middle, _CONTEXT))]
    return Plots(key + [(name, draw_shape(middle, look)) for name, look in looks.values()], plots)
