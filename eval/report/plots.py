"""Draw points, curves, heat maps, boxes and clouds as SVG text; only here is matplotlib used."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from letheon.errors import InputError, install_extra

# Okabe and Ito 2008, distinguished by any color vision; their yellow is too faint on white.
# Colors and markers have lengths without a common factor, so 45 models look different.
# Blue squares are the retrained models, black crosses the original.
COLORS = ("#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#E69F00")
MARKERS = ("o", "^", "D", "v", "P", "*", "<", "h", ">")
LINES = ("-", "--", ":", "-.")
BLUE, GREY = "#0072B2", "#767676"
_WIDTH = 4.6  # inches; on the 345 pixels that a telephone leaves, 10 pt are still readable
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.5,
    "legend.columnspacing": 1.0,
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.hashsalt": "letheon",  # the same picture has the same bytes
}


class Look(NamedTuple):
    """Color, marker and line of one model, the same in every picture."""

    color: str
    marker: str
    line: str = "-"


class Series(NamedTuple):
    """A named model's points."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]  # None where unknown: the line is broken there
    look: Look


class Spot(NamedTuple):
    """Where a point lies in its picture, in widths of it from the upper left corner."""

    series: int
    x: float
    y: float


class Points(NamedTuple):
    """A scatter as SVG text, its height in widths, and its points that lie within the axes."""

    svg: str
    tall: float
    spots: list[Spot]


class Drawing:
    """A figure with its (rows, columns) axes."""

    def __init__(self, figure: Any, rows: int, columns: int) -> None:
        self.figure = figure
        self.axes = figure.subplots(rows, columns, squeeze=False)
        self.svg = ""

    def legend(self) -> None:
        """Below the axes, each name once, so that no point is covered."""
        entries: dict[str, Any] = {}
        for plot in self.axes.flat:
            for handle, name in zip(*plot.get_legend_handles_labels(), strict=True):
                entries.setdefault(short(name, 24), handle)
        self.figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=2)


def require_matplotlib() -> None:
    """Refuse to draw where the package that does it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "got no matplotlib; expected it, which draws the report's pictures; "
            f"{install_extra('report')}, or write the tables alone with page=False"
        ) from error


@contextmanager
def new_drawing(height: float, rows: int = 1, columns: int = 1) -> Iterator[Drawing]:
    """Draw inside; afterwards `svg` holds the picture. No global state is left changed."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        drawing = Drawing(figure, rows, columns)
        yield drawing
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawing.svg = text.getvalue()


Ends = tuple[float, float]


def short(text: str, most: int) -> str:
    """At most `most` characters, an ellipsis for those cut; the end stays, where runs differ."""
    tail = most // 3
    return text if len(text) <= most else text[: most - tail - 1] + "…" + text[-tail:]


def _points(plot: Any, series: Sequence[Series], band: tuple[Ends, Ends] | None) -> None:
    if band is not None:
        (left, right), (low, high) = band
        if right > left or high > low:  # not so with one retrained model
            plot.axvspan(left, right, color=BLUE, alpha=0.15, lw=0.8)
            plot.axhspan(low, high, color=BLUE, alpha=0.15, lw=0.8, label="retrained, mean ± std")
    for (name, look), alike in groupby(series, key=lambda one: (one.name, one.look)):
        size = 10 if look.marker == "*" else 8
        points = [*alike]  # such as the retrained models, which are drawn at once
        x, y = ([v for one in points for v in one[axis]] for axis in (1, 2))
        plot.plot(x, y, look.marker, color=look.color, ms=size, mec="white", mew=0.6, label=name)


def _near(series: Sequence[Series], band: tuple[Ends, Ends]) -> tuple[Ends, Ends] | None:
    """Limits around the band that hold the nearer points; None where that is no help."""
    points = np.array([(s.x[0], s.y[0]) for s in series], float)
    center = np.array([sum(ends) / 2 for ends in band])
    reach = np.maximum(np.quantile(np.abs(points - center), 0.65, axis=0) * 1.2, 0.5)
    whole = np.maximum(np.ptp(points, axis=0), 1e-9)
    if len(points) < 5 or (2 * reach / whole).min() > 0.4:
        return None
    (left, low), (right, high) = center - reach, center + reach
    return (left, right), (low, high)


def scatter(
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    band: tuple[Ends, Ends] | None = None,
    log_x: bool = False,
) -> Points:
    """Draw points of models; `band` is the retrained models' (low, high) in x and in y.

    Where most points crowd around the band, a second panel shows its surroundings.
    """
    near = _near(series, band) if band is not None else None
    rows = 2 if near else 1
    names = len({one.name for one in series})
    with new_drawing(0.4 + 2.5 * rows + 0.1 * names, rows) as drawing:
        for plot in drawing.axes.flat:
            _points(plot, series, band)
            plot.set_ylabel(labels[1])
            plot.margins(0.08)
        drawing.axes[-1, 0].set_xlabel(labels[0])
        if near:
            drawing.axes[0, 0].set_title("all models", fontsize=10, loc="left")
            (left, right), (low, high) = near
            far = sum(
                not (left <= s.x[0] <= right and low <= (s.y[0] or 0) <= high) for s in series
            )
            title = f"around the retrained ({far} models lie further away)"
            drawing.axes[1, 0].set_title(title, fontsize=10, loc="left")
            drawing.axes[1, 0].set(xlim=near[0], ylim=near[1])
        if log_x:
            _plain_log(drawing.axes[0, 0])
        drawing.legend()
    wide, high = drawing.figure.bbox.size
    return Points(drawing.svg, high / wide, list(_find_spots(drawing, series)))


def _find_spots(drawing: Drawing, series: Sequence[Series]) -> Iterator[Spot]:
    """Find the places of the first points of the series, once they are drawn."""
    wide, high = drawing.figure.bbox.size
    for plot in drawing.axes.flat:
        for number, one in enumerate(series):
            x, y = plot.transData.transform((one.x[0], one.y[0])).tolist()
            if plot.bbox.contains(x, y):
                yield Spot(number, round(x / wide, 4), round((high - y) / wide, 4))


def _plain_log(plot: Any) -> None:
    """Set a logarithmic x axis labelled 10, 20, 50, 100, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plot.set_xscale("log")
    low, high = plot.get_xlim()
    subs = (1, 2, 5) if high / low < 50 else (1, 3) if high / low < 1000 else (1,)
    plot.xaxis.set_major_locator(LogLocator(subs=subs))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    plot.xaxis.set_minor_formatter(NullFormatter())


def curves(
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    ticks: Sequence[str] | None = None,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    floor: Sequence[float | None] | None = None,
) -> str:
    """Draw lines of models; `ticks` name positions 0, 1, ...; `band` and `floor` lie behind."""
    entries = len({one.name for one in series}) + 2
    with new_drawing(3.0 + 0.1 * entries) as drawing:
        plot = drawing.axes[0, 0]
        places = series[0].x
        if band is not None:
            plot.fill_between(places, *band, color=BLUE, alpha=0.2, lw=1, label="between retrained")
        if floor is not None:
            plot.plot(places, np.array(floor, float), ":", color=GREY, label="unrelated features")
        for name, x, y, look in series:
            values = np.array(y, float)
            plot.plot(
                x, values, marker=look.marker, color=look.color, ms=5.5, lw=1.4, label=name,
                ls=look.line, mec="white", mew=0.4,
            )  # fmt: skip
        if ticks is not None:
            names = [tick if len(tick) <= 12 else "…" + tick[-11:] for tick in ticks]
            step = -(-len(names) // 12)
            plot.set_xticks(range(0, len(names), step), names[::step], rotation=40, ha="right")
        plot.set_xlabel(labels[0])
        plot.set_ylabel(labels[1])
        drawing.legend()
    return drawing.svg


class Panel(NamedTuple):
    """One heat map: shares by row and column, None where unknown."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]


class Cloud(NamedTuple):
    """Points in the plane, each with its class's name; "" for context."""

    title: str
    points: Sequence[Sequence[float]]
    names: Sequence[str]


def heat(panels: Sequence[Panel], labels: tuple[str, str], *, change: bool = False) -> str:
    """Draw tables as colors, the per cent in each cell; `change` has a middle color at 0."""
    across = 1 if len(panels) == 1 or max(len(panel.columns) for panel in panels) > 5 else 2
    down = -(-len(panels) // across)
    tall = max(len(panel.rows) for panel in panels)
    tables = [np.array(panel.values, float) for panel in panels]
    most = max([float(np.nanmax(np.abs(t))) for t in tables if not np.isnan(t).all()], default=1.0)
    limits = (-max(most, 0.01), max(most, 0.01)) if change else (0.0, 1.0)
    same = across == 1 and all(panel.columns == panels[0].columns for panel in panels)
    each = 0.55 + 0.28 * tall + (0.0 if same else 0.6)
    with new_drawing(0.9 + down * each, down, across) as drawing:
        for place, plot in enumerate(drawing.axes.flat):
            if place >= len(panels):
                plot.set_axis_off()
                continue
            _table(plot, panels[place], tables[place], limits, change)
            if same and place < len(panels) - 1:
                plot.set_xticklabels([])
        drawing.figure.supxlabel(labels[0], fontsize=9)
        drawing.figure.supylabel(labels[1], fontsize=9)
    return drawing.svg


def _table(plot: Any, panel: Panel, values: Any, limits: Ends, change: bool) -> None:
    low, high = limits
    colors = "PuOr" if change else "cividis"
    plot.imshow(values, aspect="auto", vmin=low, vmax=high, cmap=colors)
    plot.set_title(short(panel.title, 26), fontsize=10, loc="left")
    columns, rows = (
        [short(str(name), 18) for name in axis] for axis in (panel.columns, panel.rows)
    )
    long = max(map(len, columns)) > 3
    turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    plot.set_xticks(range(len(columns)), columns, fontsize=8.5, **(turn if long else {}))
    plot.set_yticks(range(len(rows)), rows, fontsize=8.5)
    plot.tick_params(length=0)
    plot.grid(False)
    plot.spines[:].set_visible(False)
    if len(columns) > 14:
        return
    for (i, j), value in np.ndenumerate(values):
        whole = 0 if np.isnan(value) else round(100 * value)
        text = "–" if np.isnan(value) else f"{whole:+d}" if change and whole else f"{whole:d}"
        at = 0.5 if np.isnan(value) else (value - low) / (high - low)
        dark = abs(at - 0.5) > 0.33 if change else at < 0.5
        color = "white" if dark and not np.isnan(value) else "black"
        plot.text(j, i, text, ha="center", va="center", fontsize=8.5, color=color)


def boxes(groups: Sequence[tuple[str, Sequence[float], Sequence[float]]], label: str) -> str:
    """Draw two boxes a model, of the forgotten and the other classes; whiskers to the ends."""
    kinds = ((-0.17, COLORS[0], "forgotten classes"), (0.17, BLUE, "other classes"))
    with new_drawing(1.2 + 0.4 * len(groups)) as drawing:
        plot = drawing.axes[0, 0]
        for place, (_, *sides) in enumerate(groups):
            for values, (shift, color, _name) in zip(sides, kinds, strict=True):
                plot.boxplot(
                    [list(values)], positions=[place + shift], widths=0.28, whis=(0, 100),
                    orientation="horizontal", patch_artist=True, manage_ticks=False,
                    boxprops={"facecolor": color, "alpha": 0.6},
                    medianprops={"color": "black"},
                )  # fmt: skip
        plot.axvline(0, color=GREY, lw=1)
        plot.set_yticks(range(len(groups)), [short(name, 24) for name, *_ in groups], fontsize=9)
        plot.invert_yaxis()
        plot.set_xlabel(label)
        for _shift, color, name in kinds:
            plot.plot([], [], "s", color=color, alpha=0.6, ms=8, label=name)
        drawing.legend()
    return drawing.svg


def clouds(panels: Sequence[Cloud], looks: Mapping[str, Look]) -> str:
    """Draw embeddings side by side; `looks` by class name, context in grey."""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with new_drawing(0.5 + 2.2 * down, down, across) as drawing:
        for place, plot in enumerate(drawing.axes.flat):
            plot.set(xticks=[], yticks=[])
            plot.spines[:].set(visible=True, color="#D0D0D0")
            if place >= len(panels):
                plot.set_axis_off()
                continue
            title, where, names = panels[place]
            points, kind = np.asarray(where, float), np.asarray(names)
            plot.set_title(short(title, 26), fontsize=10, loc="left")
            rest = points[kind == ""]
            plot.plot(rest[:, 0], rest[:, 1], ".", color="#B0B0B0", ms=5, label="others")
            for name, look in looks.items():
                own = points[kind == name]
                plot.plot(
                    own[:, 0], own[:, 1], look.marker, color=look.color, ms=4.5, mec="white",
                    mew=0.3, label=name,
                )  # fmt: skip
        drawing.legend()
    return drawing.svg
