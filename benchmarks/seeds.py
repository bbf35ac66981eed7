"""One table from the same comparison run with several seeds: mean and standard deviation.

    for s in 1 2 3; do SEED=$s sh launch/recipes/digits.sh runs/digits-$s; done
    python benchmarks/seeds.py runs/digits-1/table runs/digits-2/table runs/digits-3/table

Prints Markdown, of the columns that every model has: each cell the mean over the runs and, behind
it, their standard deviation (n - 1).
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

# key of the row, title, factor, decimals
COLUMNS = (
    ("FA", "FA %", 100, 1),
    ("RA", "RA %", 100, 1),
    ("TFA", "TFA %", 100, 1),
    ("TRA", "TRA %", 100, 1),
    ("gap", "gap", 100, 1),
    ("knn", "k-NN %", 100, 1),
    ("cka_original", "CKA orig", 1, 3),
    ("cka_retrained", "CKA retr", 1, 3),
    ("seconds", "time s", 1, 1),
)


def cell(values: list[float | None], factor: float, decimals: int) -> str:
    """Mean and spread of one number over the runs; a dash where a run has none."""
    known = [value * factor for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    text = f"{statistics.mean(known):.{decimals}f}"
    return f"{text} ± {statistics.stdev(known):.{decimals}f}" if len(known) > 1 else text


def table(folders: list[Path]) -> str:
    """The Markdown table of the runs in `folders`, which must hold the same rows."""
    runs: list[list[dict[str, Any]]] = [
        json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["rows"]
        for folder in folders
    ]
    names = [row["name"] for row in runs[0]]
    for folder, rows in zip(folders, runs, strict=True):
        if [row["name"] for row in rows] != names:
            sys.exit(f"error: {folder} has other rows than {folders[0]}; run the same comparison")
    shown = [column for column in COLUMNS if all(r.get(column[0]) is not None for r in runs[0])]
    lines = [
        "| model | " + " | ".join(title for _, title, _, _ in shown) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    for place, name in enumerate(names):
        cells = [
            cell([rows[place].get(key) for rows in runs], factor, decimals)
            for key, _, factor, decimals in shown
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} TABLE_FOLDER [TABLE_FOLDER ...]")
    print(table([Path(arg) for arg in sys.argv[1:]]))
