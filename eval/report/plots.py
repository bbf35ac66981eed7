"""Drawing points and curves as SVG text. The only file that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from letheon.errors import InputError

# Okabe and Ito 2008, told apart with any colour vision; their yellow is too faint on white.
# Colours and markers have lengths without a common factor, so 45 models look different.
# Blue squares are the retrained models, black crosses the original.
COLOURS = ("#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#E69F00")
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
    """Colour, marker and line of one model, the same in every picture."""

    colour: str
    marker: str
    line: str = "-"


class Series(NamedTuple):
    """A named model's points."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]  # None where unknown: the line is broken there
    look: Look


class Drawing:
    """A figure with its (rows, columns) axes."""

    def __init__(self, figure: Any, rows: int, columns: int, heights: Sequence[float]) -> None:
        self.figure = figure
        self.axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
        self.svg = ""

    def legend(self) -> None:
        """Below the axes, each name once, so that no point is covered."""
        entries: dict[str, Any] = {}
        for plot in self.axes.flat:
            for handle, name in zip(*plot.get_legend_handles_labels(), strict=True):
                entries.setdefault(short(name, 24), handle)
        self.figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=2)


@contextmanager
def drawing_of(
    height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None
) -> Iterator[Drawing]:
    """Draw inside; afterwards `svg` holds the picture. No global state is left changed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "got no matplotlib, which draws the report's pictures; "
            "pip install '.[report]' in the checkout, or write the tables alone with page=False"
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        drawing = Drawing(figure, rows, columns, heights or [1.0] * rows)
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
    for name, x, y, look in series:
        size = 10 if look.marker == "*" else 8
        plot.plot(x, y, look.marker, color=look.colour, ms=size, mec="white", mew=0.6, label=name)


def _near(series: Sequence[Series], band: tuple[Ends, Ends]) -> tuple[Ends, Ends] | None:
    """Limits around the band that hold the nearer points; None where that is no help."""
    points = np.array([(s.x[0], s.y[0]) for s in series], float)
    centre = np.array([sum(ends) / 2 for ends in band])
    reach = np.maximum(np.quantile(np.abs(points - centre), 0.65, axis=0) * 1.2, 0.5)
    whole = np.maximum(np.ptp(points, axis=0), 1e-9)
    if len(points) < 5 or (2 * reach / whole).min() > 0.4:
        return None
    (left, low), (right, high) = centre - reach, centre + reach
    return (left, right), (low, high)


def scatter(
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    band: tuple[Ends, Ends] | None = None,
    log_x: bool = False,
) -> str:
    """Points of models; `band` is the retrained models' (low, high) in x and in y.

    Where most points crowd around the band, a second panel shows its surroundings.
    """
    near = _near(series, band) if band is not None else None
    rows = 2 if near else 1
    names = len({one.name for one in series})
    with drawing_of(0.4 + 2.5 * rows + 0.1 * names, rows) as drawing:
        for plot in drawing.axes.flat:
            _points(plot, series, band)
            plot.set_ylabel(labels[1])
            plot.margins(0.08)
        drawing.axes[-1, 0].set_xlabel(labels[0])
        if near:
            drawing.axes[0, 0].set_title("all models", fontsize=10, loc="left")
            drawing.axes[1, 0].set_title("around the retrained", fontsize=10, loc="left")
            drawing.axes[1, 0].set(xlim=near[0], ylim=near[1])
        if log_x:
            _plain_log(drawing.axes[0, 0])
        drawing.legend()
    return drawing.svg


def _plain_log(plot: Any) -> None:
    """A logarithmic x axis labelled 10, 20, 50, 100, ..."""
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
    """Lines of models; `ticks` name positions 0, 1, ...; `band` and `floor` are drawn behind."""
    entries = len({one.name for one in series}) + 2
    with drawing_of(3.0 + 0.1 * entries) as drawing:
        plot = drawing.axes[0, 0]
        places = series[0].x
        if band is not None:
            plot.fill_between(places, *band, color=BLUE, alpha=0.2, lw=1, label="between retrained")
        if floor is not None:
            plot.plot(places, np.array(floor, float), ":", color=GREY, label="unrelated features")
        for name, x, y, look in series:
            values = np.array(y, float)
            plot.plot(
                x, values, marker=look.marker, color=look.colour, ms=5.5, lw=1.4, label=name,
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
