"""Drawing tables as heat maps, spreads as boxes, and embeddings, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from letheon.eval.report.plots import BLUE, COLOURS, GREY, Ends, Look, drawing_of, short


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
    """Tables as colour, the number (per cent) in each cell; `change` has a middle colour at 0."""
    across = 1 if len(panels) == 1 or max(len(panel.columns) for panel in panels) > 5 else 2
    down = -(-len(panels) // across)
    tall = max(len(panel.rows) for panel in panels)
    tables = [np.array(panel.values, float) for panel in panels]
    most = max([float(np.nanmax(np.abs(t))) for t in tables if not np.isnan(t).all()], default=1.0)
    limits = (-max(most, 0.01), max(most, 0.01)) if change else (0.0, 1.0)
    same = across == 1 and all(panel.columns == panels[0].columns for panel in panels)
    each = 0.55 + 0.28 * tall + (0.0 if same else 0.6)
    with drawing_of(0.9 + down * each, down, across) as drawing:
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
    colours = "PuOr" if change else "cividis"
    plot.imshow(values, aspect="auto", vmin=low, vmax=high, cmap=colours)
    plot.set_title(short(panel.title, 26), fontsize=10, loc="left")
    columns, rows = (
        [short(str(name), 18) for name in axis] for axis in (panel.columns, panel.rows)
    )
    turned = max(map(len, columns)) > 3
    turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    plot.set_xticks(range(len(columns)), columns, fontsize=8.5, **(turn if turned else {}))
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
        colour = "white" if dark and not np.isnan(value) else "black"
        plot.text(j, i, text, ha="center", va="center", fontsize=8.5, color=colour)


def boxes(groups: Sequence[tuple[str, Sequence[float], Sequence[float]]], label: str) -> str:
    """Two boxes a model, of the forgotten and the other classes' values; whiskers to the ends."""
    kinds = ((-0.17, COLOURS[0], "forgotten classes"), (0.17, BLUE, "other classes"))
    with drawing_of(1.2 + 0.4 * len(groups)) as drawing:
        plot = drawing.axes[0, 0]
        for place, (_, *sides) in enumerate(groups):
            for values, (shift, colour, _name) in zip(sides, kinds, strict=True):
                plot.boxplot(
                    [list(values)], positions=[place + shift], widths=0.28, whis=(0, 100),
                    orientation="horizontal", patch_artist=True, manage_ticks=False,
                    boxprops={"facecolor": colour, "alpha": 0.6},
                    medianprops={"color": "black"},
                )  # fmt: skip
        plot.axvline(0, color=GREY, lw=1)
        plot.set_yticks(range(len(groups)), [short(name, 24) for name, *_ in groups], fontsize=9)
        plot.invert_yaxis()
        plot.set_xlabel(label)
        for _shift, colour, name in kinds:
            plot.plot([], [], "s", color=colour, alpha=0.6, ms=8, label=name)
        drawing.legend()
    return drawing.svg


def clouds(panels: Sequence[Cloud], looks: Mapping[str, Look]) -> str:
    """Embeddings side by side; `looks` by class name, context in grey."""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with drawing_of(0.5 + 2.2 * down, down, across) as drawing:
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
                    own[:, 0], own[:, 1], look.marker, color=look.colour, ms=4.5, mec="white",
                    mew=0.3, label=name,
                )  # fmt: skip
        drawing.legend()
    return drawing.svg
