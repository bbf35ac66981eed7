"""The tables of a page of docs/results, from the CSV beside it that `letheon evaluate` wrote.

`plot.py` writes each between its markers, such as `<!-- accuracy:start -->`. The runs of one method
that differ in their seed are one row: mean and standard deviation.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

Rows = Mapping[str, Sequence[Mapping[str, str]]]
ROLES = ("original", "retrained", "control", "unlearned")
"""The order of a page, by the CSV's roles."""


@dataclass(frozen=True)
class Column:
    """One number of the CSV, as a page shows it."""

    title: str
    field: str
    factor: float = 1.0
    digits: int = 2


def percent(title: str, field: str) -> Column:
    """A share, as a percentage with one digit."""
    return Column(f"{title} %", field, 100, 1)


TABLES: dict[str, tuple[Column, ...]] = {
    "accuracy": (
        percent("FA", "FA"), percent("RA", "RA"), percent("TFA", "TFA"), percent("TRA", "TRA"),
        Column("gap", "gap", 100, 1), percent("k-NN", "knn"),
        Column("CKA orig", "cka_original", digits=3), Column("CKA retr", "cka_retrained", digits=3),
        Column("floor", "cka_retrained_floor", digits=3),
        percent("nearer retrained", "closer_to_retrained"),
    ),
    "forgetting": (
        percent("UA", "UA"), percent("RA", "RA"), percent("TFA", "TFA"), percent("TRA", "TRA"),
        Column("gap", "gap", 100, 1), Column("CKA orig", "cka_original", digits=3),
        Column("CKA retr", "cka_retrained", digits=3),
        percent("nearer retrained", "closer_to_retrained"),
        Column("how far", "margin_distance", digits=1),
        Column("p of verdict", "verdict_p", digits=3),
        Column("images read", "images_read", digits=0),
    ),
    "attacks": (
        percent("prototype", "attack_prototype"), percent("class means", "attack_class_means"),
        percent("few-shot probe", "probe_few_shot"), percent("4 bits", "attack_quantized"),
        percent("retain-only", "attack_retain_only"), percent("prompt", "attack_prompt"),
        Column("barrier", "mode_barrier"), Column("over-unl.", "over_unlearning", digits=3),
    ),
    "membership": (
        percent("MIA AUC", "mia_auc"), percent("within class", "mia_within_class_auc"),
        percent("RMIA AUC", "rmia_auc"), percent("SVC conf.", "svc_efficacy_confidence_published"),
        percent("LR-entropy", "lr_entropy"), percent("loss two-sample", "loss_two_sample"),
        Column("JS", "js", digits=3), Column("act. dist.", "activation_distance", digits=3),
        Column("IDI", "idi"), Column("weight dist.", "weight_distance_original", digits=3),
    ),
}  # fmt: skip
TABLES["forgetting-and-cost"] = (
    *TABLES["forgetting"], Column("cost", "epochs_of_finetune", digits=2),
)  # fmt: skip


def read_rows(path: Path) -> Rows:
    """Read the rows of a CSV by method: the original, the retrained models, controls, methods."""
    groups: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    with path.open(newline="") as lines:
        for line in csv.DictReader(lines):
            name = re.sub(r"-seed\d+$", "", line["name"])
            groups["retrained" if line["role"] == "retrained" else name].append(line)
    return dict(sorted(groups.items(), key=lambda one: (ROLES.index(one[1][0]["role"]), one[0])))


def show_column(rows: Sequence[Mapping[str, str]], column: Column) -> str:
    """The mean of a number over rows, with its standard deviation where there are several."""
    values = [column.factor * float(row[column.field]) for row in rows if row.get(column.field)]
    if not values:
        return "-"
    mean = f"{fmean(values):.{column.digits}f}"
    return f"{mean} ± {stdev(values):.{column.digits}f}" if len(values) > 1 else mean


def as_markdown(rows: Rows, columns: Sequence[Column]) -> str:
    """A table with a line for each method."""
    lines = ["| model | " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, runs in rows.items():
        note = {"retrained": f", {len(runs)}", "control": " (control)"}.get(runs[0]["role"], "")
        cells = " | ".join(show_column(runs, column) for column in columns)
        lines.append(f"| {name}{note} | {cells} |")
    return "\n".join(lines)


def results_pages(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield page, marker and table of every page of a folder that has a CSV and markers.

    Raises:
        KeyError: a marker that names no table.
    """
    for path in sorted(folder.glob("*.csv")):
        page = path.with_suffix(".md")
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        rows = read_rows(path)
        for marker in re.findall(r"<!-- ([\w-]+):start -->", text):
            yield page, marker, as_markdown(rows, TABLES[marker])
