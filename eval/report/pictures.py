"""Draw the pictures of a report, or say what is missing; and how models look in all of them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from letheon.eval.report import grids
from letheon.eval.report.definitions import define, format_value
from letheon.eval.report.grids import Grid, Plots
from letheon.eval.report.plots import (
    BLUE,
    COLORS,
    GREY,
    LINES,
    MARKERS,
    Cloud,
    Look,
    Panel,
    Points,
    Series,
    boxes,
    clouds,
    curves,
    heat,
    scatter,
)
from letheon.eval.report.rows import Prepared

Row = dict[str, Any]


class Mark(NamedTuple):
    """A point of a picture that tells its numbers where it is pointed at."""

    row: int  # of the model in the table
    text: str
    x: float  # in widths of the picture, from its upper left corner
    y: float


class Picture(NamedTuple):
    """One picture of the page, or the sentence that stands in its place."""

    title: str
    caption: str
    image: str | None = None  # a data URI
    alt: str = ""
    tall: float = 0.0  # height in widths, where there are marks
    marks: tuple[Mark, ...] = ()
    grid: Grid | None = None  # of many models, in the place of an image
    plots: Plots | None = None  # the same, of points


PANELS = 12  # of a model each; more are laid out as a line or a small plot a model
LOOKS = len(COLORS) * len(MARKERS)  # models that points and curves can tell apart
_NAMED = 12  # of the models that have looks of their own where there are more than `LOOKS`
_FAINT = Look(GREY, "o")
_LINES = " One line a model: the nearest to the retrained first, controls last."


def assign_marks(names: Sequence[str]) -> dict[str, Look]:
    """Name -> color, marker and line, all different for up to 45 names."""
    return {
        name: Look(
            COLORS[n % len(COLORS)],
            MARKERS[n % len(MARKERS)],
            LINES[n // len(COLORS) % len(LINES)],
        )
        for n, name in enumerate(names)
    }


def assign_looks(prepared: Prepared) -> dict[str, Look]:
    """Model -> color and marker; the original and the retrained models always look the same.

    Of more than `LOOKS` others the nearest to the retrained models look different, and the controls
    as far as looks go; all the rest look the same.
    """
    fixed = {"original": Look("#000000", "X"), "retrained": Look(BLUE, "s")}
    others = [row["name"] for row in prepared.of_role("control", "unlearned")]
    kept = {row["name"]: fixed[row["role"]] for row in prepared.of_role(*fixed)}
    if len(others) <= LOOKS:
        return kept | assign_marks(others)
    nearest = sorted(prepared.of_role("unlearned"), key=distance_to_retrained)[:_NAMED]
    named = [row["name"] for row in (*nearest, *prepared.of_role("control"))][:LOOKS]
    return kept | dict.fromkeys(others, _FAINT) | assign_marks(named)


def embed_svg(title: str, caption: str, svg: str, alt: str) -> Picture:
    """Make a picture with its drawing embedded."""
    code = base64.b64encode(svg.encode()).decode()
    return Picture(title, caption, f"data:image/svg+xml;base64,{code}", alt)


def embed_points(
    title: str, caption: str, points: Points, alt: str, texts: Sequence[tuple[int, str]]
) -> Picture:
    """Make a picture of a scatter whose points tell a text each, with their rows' numbers."""
    marks = (Mark(*texts[spot.series], spot.x, spot.y) for spot in points.spots)
    picture = embed_svg(title, caption, points.svg, alt)
    return picture._replace(tall=round(points.tall, 4), marks=tuple(marks))


def join_facts(values: Sequence[tuple[str, str]]) -> str:
    """Join the facts of an alternative text, twelve at most."""
    facts = [f"{name}: {value}" for name, value in values[:12]]
    more = [f"and {len(values) - 12} more in the table"] if len(values) > 12 else []
    return "; ".join(facts + more) + "."


def legend_name(prepared: Prepared, row: Row) -> str:
    """Name a model in a legend, where several retrained models share one entry."""
    seeds = len(prepared.of_role("retrained"))
    several = row["role"] == "retrained" and seeds > 1
    return f"retrained ({seeds} seeds)" if several else str(row["name"])


def _is_large(prepared: Prepared) -> bool:
    """Whether there are more models than looks."""
    return len(prepared.of_role("control", "unlearned")) > LOOKS


def _make_series(
    prepared: Prepared, shown: Sequence[Row], place_of: Callable[[Row], tuple[float, float]]
) -> tuple[list[Row], list[Series], str]:
    """A series a model; those that look the same come first, below the others, with a sentence."""
    of = assign_looks(prepared)
    alike = [row for row in shown if of[row["name"]] == _FAINT]
    shown = [*alike, *(row for row in shown if of[row["name"]] != _FAINT)]
    series = []
    for row in shown:
        look, (x, y) = of[row["name"]], place_of(row)
        name = f"{len(alike)} others" if look == _FAINT else legend_name(prepared, row)
        series.append(Series(name, [x], [y], look))
    ranked = any(distance_to_retrained(row) < float("inf") for row in shown)
    than = ", further from the retrained ones than those named" if ranked else ""
    return shown, series, f" Grey: the {len(alike)} others{than}." if alike else ""


def distance_to_retrained(row: Row) -> float:
    """Return a row's gap, by which models are sorted; infinite where it is not known."""
    known = [row[key] for key in ("gap", "average_gap") if row.get(key) is not None]
    return float(known[0]) if known else float("inf")


def select_rows(prepared: Prepared, key: str) -> list[Row]:
    """Select the rows that have `key`: the original, the retrained, then by gap, controls last."""
    having = [row for row in prepared.rows if row.get(key)]
    return sorted(having, key=_place)


def _place(row: Row) -> tuple[int, float]:
    roles = ("original", "retrained", "unlearned", "control")
    return roles.index(row["role"]), distance_to_retrained(row)


def _numbers(prepared: Prepared) -> dict[str, int]:
    """Model -> its number in the table."""
    return {str(row["name"]): n for n, row in enumerate(prepared.rows)}


_HEAT_CLASSES = 30  # more classes than these are summed up in boxes


def trade_off(prepared: Prepared) -> Picture:
    """Draw forget against retain accuracy; held-out, unless that is known of fewer models."""
    title = "Forget–retain trade-off"

    def rows_with(x: str, y: str) -> list[dict[str, float]]:
        return [r for r in prepared.rows if r.get(x) is not None and r.get(y) is not None]

    x, y = max((("TFA", "TRA"), ("FA", "RA")), key=lambda pair: len(rows_with(*pair)))
    shown = rows_with(x, y)
    if not shown:
        return Picture(title, "Left out: no model has both forget and retain accuracy.")
    shown, series, told = _make_series(prepared, shown, lambda r: (100 * r[x], 100 * r[y]))
    caption = f"{x} against {y} in per cent; a good model lies where the retrained ones do.{told}"
    bands = prepared.reference.bands if prepared.reference else {}
    band = None
    if x in bands and y in bands:
        (left, right), (low, high) = (
            (100 * (b.mean - (b.std or 0)), 100 * (b.mean + (b.std or 0)))
            for b in (bands[x], bands[y])
        )
        band = ((left, right), (low, high))
        caption += (
            f" Shaded: mean ± standard deviation of {bands[x].seeds} retrained models."
            if bands[x].std is not None
            else " One retrained model: no band can be drawn."
        )
    labels = (f"{x}, forget accuracy (%)", f"{y}, retain accuracy (%)")
    points = scatter(series, labels, band=band)
    facts = [
        (str(r["name"]), f"{format_value(x, r[x])} and {format_value(y, r[y])}") for r in shown
    ]
    texts = [
        (prepared.rows.index(r), f"{r['name']}: {x} {format_value(x, r[x])} %, "
        f"{y} {format_value(y, r[y])} %") for r in shown
    ]  # fmt: skip
    alt = f"Scatter of {x} against {y} in per cent. {join_facts(facts)}"
    return embed_points(title, caption, points, alt, texts)


def time_gap(prepared: Prepared) -> Picture:
    """Draw run time against the gap to the retrained models."""
    title = "Time against gap"
    timed = [row for row in prepared.rows if (row.get("seconds") or 0) > 0]
    gap = next(
        (k for k in ("average_gap", "gap") if any(r.get(k) is not None for r in timed)), None
    )
    if gap is None:
        why = 'Left out: no model has both "seconds" and a gap to a retrained model.'
        return Picture(title, why)
    shown = [row for row in timed if row.get(gap) is not None]
    if not any(row["role"] == "unlearned" for row in shown):
        why = "Left out: no unlearned model has a run time of its own; runs of one pass share it."
        return Picture(title, why)
    shown, series, told = _make_series(prepared, shown, lambda r: (r["seconds"], 100 * r[gap]))
    what = define(gap).title.lower()
    points = scatter(series, ("run time (s)", f"{what} (points)"), log_x=True)
    facts = [(r["name"], f"{r['seconds']:.0f} s, {100 * r[gap]:.2f} points") for r in shown]
    caption = (
        f"Lower left is better. The {what} of a retrained model is to the mean of the others; time "
        f"is without compilation, precomputation and evaluation.{told}"
    )
    texts = [
        (prepared.rows.index(r), f"{name}: {fact}")
        for r, (name, fact) in zip(shown, facts, strict=True)
    ]
    alt = f"Scatter of run time against {what}. {join_facts(facts)}"
    return embed_points(title, caption, points, alt, texts)


def class_change(prepared: Prepared) -> Picture:
    """Draw accuracy of each class less the original model's."""
    title, key = "Accuracy change by class", "accuracy_by_class"
    base = next((r for r in prepared.of_role("original") if r.get(key)), None)
    if base is None:
        return Picture(title, f'Left out: the original model\'s row has no "{key}".')
    count = len(base[key])
    others = [r for r in prepared.rows if r is not base and len(r.get(key) or ()) == count]
    if not others:
        return Picture(title, f'Left out: no other model\'s row has "{key}" of {count} classes.')
    if _is_large(prepared):
        others.sort(key=_place)
    changes = [
        [None if a is None or b is None else a - b for a, b in zip(r[key], base[key], strict=True)]
        for r in others
    ]
    names = [r["name"] for r in others]
    gone = {c for r in prepared.rows for c in (r.get("forgotten") or ())}
    sides = [_sides(change, gone) for change in changes]
    facts = [(name, _means(*side)) for name, side in zip(names, sides, strict=True)]
    known = next((r["classes"] for r in prepared.rows if r.get("classes")), range(count))
    columns = [f"✗ {name}" if c in gone else str(name) for c, name in enumerate(known)]
    if count <= _HEAT_CLASSES:
        caption = "Held-out accuracy less the original model's, in points."
        if _is_large(prepared):
            grid = grids.change_grid(changes, names, _numbers(prepared), columns)
            caption += f" ✗: to be forgotten.{_LINES}"
            return Picture(title, caption, grid=grid)
        panel = Panel("", names, columns, changes)
        svg = heat([panel], ("class (✗: to be forgotten)", ""), change=True)
    elif _is_large(prepared):
        caption = f"Held-out accuracy of {count} classes less the original model's, in points."
        grid = grids.box_grid(sides, names, _numbers(prepared))
        return Picture(title, caption + _LINES, grid=grid)
    else:
        groups = [(name, *side) for name, side in zip(names, sides, strict=True)]
        svg = boxes(groups, "change of accuracy from the original (points)")
        caption = (
            f"Held-out accuracy of {count} classes less the original model's; "
            "whiskers reach the extremes."
        )
    return embed_svg(
        title, caption, svg, f"Change of accuracy by class, in points. {join_facts(facts)}"
    )


def _sides(change: Sequence[float | None], gone: set[int]) -> tuple[list[float], list[float]]:
    """Changes of the forgotten and of the other classes, in points."""
    known = [(c in gone, 100 * v) for c, v in enumerate(change) if v is not None]
    return [v for inside, v in known if inside], [v for inside, v in known if not inside]


def _means(gone: Sequence[float], others: Sequence[float]) -> str:
    sides = (("forgotten", gone), ("others", others))
    return ", ".join(f"{name} {sum(v) / len(v):+.1f} on average" for name, v in sides if v)


def relearn(prepared: Prepared) -> list[Picture]:
    """Draw relearn curves, one picture a recipe: same data, related data, head only."""
    title, key = "Relearn curve", "relearn"
    recipes = list(dict.fromkeys(name for r in prepared.rows for name in (r.get(key) or {})))
    if not recipes:
        return [Picture(title, f'Left out: no model\'s row has "{key}".')]
    of, pictures = assign_looks(prepared), []
    for recipe in recipes:
        caption = f"Held-out accuracy on the forgotten classes while relearning: {recipe}."
        if _is_large(prepared):
            shown = [r for r in select_rows(prepared, key) if r[key].get(recipe)]
            grid = grids.relearn_grid(shown, _numbers(prepared), recipe)
            pictures.append(Picture(f"{title}: {recipe}", caption + _LINES, grid=grid))
            continue
        series, facts = [], []
        for row in prepared.rows:
            curve = (row.get(key) or {}).get(recipe)
            if curve:
                values = [100 * share for share in curve["accuracy"]]
                name = legend_name(prepared, row)
                series.append(Series(name, curve["steps"], values, of[row["name"]]))
                ends = f"{values[0]:.0f} to {values[-1]:.0f} per cent in {curve['steps'][-1]} steps"
                facts.append((row["name"], ends))
        svg = curves(series, ("step", "forgotten classes (%)"))
        pictures.append(embed_svg(f"{title}: {recipe}", caption, svg, join_facts(facts)))
    return pictures


_CKA = "Linear CKA of pooled features with the retrained reference."


def cka_layers(prepared: Prepared) -> Picture:
    """Draw CKA to the retrained reference, layer by layer."""
    title, key = "CKA to the retrained model, layer by layer", "cka_by_layer"
    having = [row for row in prepared.rows if row.get(key) and row["role"] != "retrained"]
    if not having:
        return Picture(title, f'Left out: no model\'s row has "{key}".')
    if _is_large(prepared):
        grid = grids.layer_grid(select_rows(prepared, key), _numbers(prepared))
        return Picture(title, f"{_CKA}{_LINES}", grid=grid)
    layers = list(having[0][key])
    shown = [row for row in having if list(row[key]) == layers]
    other = [row["name"] for row in having if row not in shown]
    caption = _CKA
    pairs = [
        row[key] for row in prepared.of_role("retrained") if list(row.get(key) or ()) == layers
    ]
    between = [[pair[n] for pair in pairs if pair[n] is not None] for n in layers]
    band = None
    if all(between):
        band = ([min(values) for values in between], [max(values) for values in between])
        caption += " Shaded: where other retrained models lie."
    floors = [r["cka_floor_by_layer"] for r in shown if r.get("cka_floor_by_layer")]
    floor = [floors[0].get(n) for n in layers] if floors else None
    if floor:
        caption += " Dotted: the value that unrelated features reach."
    if other:
        caption += f" Not drawn, for their layers have other names: {', '.join(other)}."
    places, of = list(range(len(layers))), assign_looks(prepared)
    series = [Series(r["name"], places, [r[key][n] for n in layers], of[r["name"]]) for r in shown]
    svg = curves(series, ("layer", "CKA"), ticks=layers, band=band, floor=floor)
    facts = [(s.name, f"{_short(s.y[0])} to {_short(s.y[-1])}") for s in series]
    return embed_svg(
        title, caption, svg, f"CKA from {layers[0]} to {layers[-1]}. {join_facts(facts)}"
    )


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def domain_matrix(prepared: Prepared) -> Picture:
    """Draw k-NN accuracy from each domain to each."""
    title, key = "Domain matrix", "domain_matrix"
    shown = select_rows(prepared, key)
    if not shown:
        return Picture(title, f'Left out: no model\'s row has "{key}".')

    def panel_of(row: Row) -> Panel:
        table = row[key]
        columns = list(next(iter(table.values())))
        values = [[line.get(column) for column in columns] for line in table.values()]
        return Panel(row["name"], list(table), columns, values)

    caption = "k-NN accuracy in per cent: neighbours of one domain vote on images of another."
    panels = _join_retrained(shown, panel_of)
    if len(panels) > PANELS:
        caption += f" Neighbours from → tested on.{_LINES}"
        return Picture(title, caption, grid=grids.domain_grid(shown, _numbers(prepared)))
    svg = heat(panels, ("tested on", "neighbours from"))
    alt = f"Heat maps of k-NN accuracy, domain by domain, for {_titles(panels)}."
    return embed_svg(title, caption, svg, alt)


def knn_confusion(prepared: Prepared) -> Picture:
    """Draw what neighbors call the forgotten classes."""
    title, key = "k-NN confusion of the forgotten classes", "knn_confusion"
    shown = select_rows(prepared, key)
    if not shown:
        return Picture(title, f'Left out: no model\'s row has "{key}".')

    def panel_of(row: Row) -> Panel:
        table = row[key]
        return Panel(row["name"], table["rows"], table["columns"], table["shares"])

    caption = "What nearest neighbours in feature space call each forgotten class, in per cent."
    panels = _join_retrained(shown, panel_of)
    if len(panels) > PANELS:
        caption += (
            " Forgotten class → called, for the names called most; –: this model's measurement has "
            f"it within the rest.{_LINES}"
        )
        return Picture(title, caption, grid=grids.confusion_grid(shown, _numbers(prepared)))
    svg = heat(panels, ("called", "forgotten class"))
    alt = f"Heat maps of what forgotten classes are called, for {_titles(panels)}."
    return embed_svg(title, caption, svg, alt)


def _join_retrained(rows: Sequence[Row], panel_of: Callable[[Row], Panel]) -> list[Panel]:
    """Lay out a panel a row; several retrained models of equal headings share one, their mean.

    A cell that one of them lacks is unknown in it.
    """
    shared: dict[Any, list[Panel]] = {}
    for row in rows:
        panel = panel_of(row)
        alike = (tuple(panel.rows), tuple(panel.columns)) if row["role"] == "retrained" else None
        shared.setdefault(alike or row["name"], []).append(panel)
    panels = []
    for of in shared.values():
        one = of[0]
        if len(of) > 1:
            cells = zip(*(np.array(panel.values, float) for panel in of), strict=True)
            mean = [np.mean(lines, axis=0).tolist() for lines in cells]
            one = Panel(f"retrained, mean of {len(of)}", one.rows, one.columns, mean)
        panels.append(one)
    return panels


def _titles(panels: Sequence[Panel | Cloud]) -> str:
    return ", ".join(panel.title for panel in panels)


def embeddings(prepared: Prepared) -> Picture:
    """Draw t-SNE of the forgotten classes before (original) and after."""
    title, key = "t-SNE of the forgotten classes, before and after", "embedding"
    shown = select_rows(prepared, key)
    first = next((row for row in prepared.of_role("retrained") if row.get(key)), None)
    several = sum(row["role"] == "retrained" for row in shown)
    every, shown = shown, [r for r in shown if r is first or r["role"] != "retrained"]
    if len(shown) < 2 or shown[0]["role"] != "original":
        return Picture(title, f'Left out: "{key}" is needed of the original and of another model.')
    known = next((row["classes"] for row in prepared.rows if row.get("classes")), None)

    def class_name(label: int) -> str:
        return "" if label < 0 else str(known[label] if known else label)

    many = len(shown) > PANELS
    shown = every if many else shown
    labels = sorted({label for row in shown for label in row[key]["labels"] if label >= 0})
    looks_of = assign_marks([class_name(label) for label in labels])
    caption = (
        "Colored: held-out images of the forgotten classes; grey: of others. Each model is "
        "embedded by itself: look whether the classes stand apart, not where."
    )
    if many:
        looks = {label: (class_name(label), looks_of[class_name(label)]) for label in labels}
        plots = grids.cloud_plots(shown, _numbers(prepared), looks)
        caption += " One plot a model: the nearest to the retrained first, controls last."
        return Picture(title, caption, plots=plots)
    panels = [
        Cloud(row["name"], row[key]["points"], [class_name(label) for label in row[key]["labels"]])
        for row in shown
    ]
    if several > 1:
        caption += f" Of {several} retrained models the first."
    alt = f"Embeddings of {', '.join(looks_of)} in {_titles(panels)}."
    return embed_svg(title, caption, clouds(panels, looks_of), alt)


def draw_pictures(prepared: Prepared) -> list[Picture]:
    """Draw all pictures in the page's order; those that cannot be drawn have the reason."""
    return [
        trade_off(prepared),
        time_gap(prepared),
        class_change(prepared),
        cka_layers(prepared),
        domain_matrix(prepared),
        knn_confusion(prepared),
        *relearn(prepared),
        embeddings(prepared),
    ]
