"""Rows of `measure` as a table for a terminal or Markdown, and what each column means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Row = Mapping[str, Any]


class Column(NamedTuple):
    """One metric: where it stands in a row, how it is printed and what it is."""

    title: str
    kind: Literal["share", "cka", "seconds"]
    meaning: str  # one line, for the legend
    definition: str  # one sentence, with its source


_COLUMNS: dict[str, Column] = {
    "FA": Column(
        "FA %",
        "share",
        "accuracy on the forget set",
        "Top-1 accuracy on the training images to be forgotten, under the test transform; exact "
        "count (Jia et al. 2023, 'Model Sparsity Can Simplify Machine Unlearning': 1 - UA).",
    ),
    "RA": Column(
        "RA %",
        "share",
        "accuracy on the retain set",
        "Top-1 accuracy on the training images to be kept, under the test transform; exact count "
        "(Jia et al. 2023).",
    ),
    "TFA": Column(
        "TFA %",
        "share",
        "accuracy on test images of the forgotten classes",
        "Top-1 accuracy on held-out images of the forgotten classes; exact count (Kim et al. 2025, "
        "'Are We Truly Forgetting?').",
    ),
    "TRA": Column(
        "TRA %",
        "share",
        "accuracy on test images of the other classes",
        "Top-1 accuracy on held-out images of the classes kept, which is what TA means for "
        "class-wise forgetting; exact count (Kim et al. 2025).",
    ),
    "UA": Column(
        "UA %",
        "share",
        "1 - FA",
        "Unlearning accuracy, 1 - FA (Jia et al. 2023).",
    ),
    "gap": Column(
        "gap",
        "share",
        "mean distance of FA, RA, TFA, TRA to the retrained model, in points",
        "Mean absolute difference to the retrained model over FA, RA, TFA and TRA, in percentage "
        "points (Fan et al. 2024, 'SalUn', average gap, there with an attack in place of TFA).",
    ),
    "knn": Column(
        "k-NN %",
        "share",
        "nearest-neighbour accuracy on the downstream domains, their mean",
        "Share of images whose nearest neighbours (k = 5, cosine, pooled features, unless stated "
        "otherwise) in a fixed 80 % of the same domain vote for their class, tested on the other "
        "20 %, mean over the domains (Kim et al. 2025).",
    ),
    "cka_original": Column(
        "CKA orig",
        "cka",
        "likeness of the features to the original model's (1: the same up to rotation)",
        "Linear CKA of pooled features with the original model over the whole test set, "
        "|Y'X|^2 / (|X'X| |Y'Y|) with centred features and Frobenius norms (Kornblith et al. "
        "2019, section 3).",
    ),
    "cka_retrained": Column(
        "CKA retr",
        "cka",
        "likeness of the features to the retrained model's",
        "Linear CKA of pooled features with the retrained model over the whole test set "
        "(Kornblith et al. 2019, section 3).",
    ),
    "cka_retrained_floor": Column(
        "floor",
        "cka",
        "CKA retr with the images of one model shuffled: what unrelated features reach",
        "The mean of the same CKA over all shufflings of one model's images: the value that "
        "carries no information at this number of images and features.",
    ),
    "seconds": Column(
        "time s",
        "seconds",
        "run time of forgetting: preparation and training, compilation and evaluation apart",
        "RTE: seconds of the forgetting run, its preparation (masks, statistics) and its training; "
        "compilation and evaluation apart.",
    ),
}

COLUMNS = tuple(key for key in _COLUMNS if key != "UA")
"""The columns of the table, in order; those no row has are left out."""


def definitions() -> dict[str, str]:
    """Metric -> its definition in one sentence, with its source."""
    return {key: column.definition for key, column in _COLUMNS.items()}


def _cell(kind: str, value: Any) -> str:
    if value is None:
        return "-"
    if kind == "share":
        return f"{100 * value:.1f}"
    return f"{value:.3f}".replace("-0.000", "0.000") if kind == "cka" else f"{value:.1f}"


def _present(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    return [key for key in columns if any(row.get(key) is not None for row in rows)]


def _grid(rows: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    titles = ["model", *(_COLUMNS[key].title for key in columns)]
    cells = [
        [str(row["name"]), *(_cell(_COLUMNS[key].kind, row.get(key)) for key in columns)]
        for row in rows
    ]
    return [titles, *cells]


def legend(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> list[str]:
    """One line for each column the table has."""
    shown = _present(rows, columns)
    width = max((len(_COLUMNS[key].title) for key in shown), default=0)
    return [f"{_COLUMNS[key].title:<{width}}  {_COLUMNS[key].meaning}" for key in shown]


def conditions(rows: Sequence[Row]) -> list[str]:
    """One line on what k-NN and CKA were measured under, where all rows say the same."""
    said = [row["conditions"] for row in rows if "conditions" in row]
    keys = ("ks", "metric", "weights", "temperature", "space", "split", "cka")
    if not said or any(other[key] != said[0][key] for other in said for key in keys):
        return []
    under = said[0]
    votes = under["weights"] + (f" {under['temperature']}" if under["temperature"] else "")
    return [
        f"k-NN: k = {under['ks'][0]}, {under['metric']}, {votes} votes, {under['space']} "
        f"{'features' if under['space'] == 'pooled' else 'as features'}, {under['split']} 80/20 "
        f"split. CKA: {under['cka']}."
    ]


def plain(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """An aligned table for a terminal, with its legend.

    Args:
        rows: results of `measure`, each with "name" and, where it ran, "seconds".
        columns: keys wanted, in order.
    """
    grid = _grid(rows, _present(rows, columns))
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = []
    for cells in grid:
        first = f"{cells[0]:<{widths[0]}}"
        rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *legend(rows, columns), *conditions(rows)])


def markdown(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """The same as a Markdown table; a bar in a name is escaped."""
    grid = [
        [cell.replace("|", "\\|") for cell in cells]
        for cells in _grid(rows, _present(rows, columns))
    ]
    ruler = ["---", *("---:" for _ in grid[0][1:])]
    lines = ["| " + " | ".join(cells) + " |" for cells in [grid[0], ruler, *grid[1:]]]
    below = [*legend(rows, columns), *conditions(rows)]
    return "\n".join([*lines, "", *(f"- {line}" for line in below)])
