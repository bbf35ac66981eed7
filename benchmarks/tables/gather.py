"""Write the CSV of a page of docs/results: that of `letheon evaluate`, with two columns more.

    cd benchmarks
    python -m tables.gather --table FOLDER/table --runs FOLDER/methods --out ../docs/results/X.csv

`verdict_p` is the p of "one of the retrained models" from the rows of metrics.json; `images_read`
the images that training read, from the run's run.json. Both are empty where they are not known.
Of several tables beside one another's retrained models, such as of other seeds, each model has one
row: that of the first table that has it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from letheon import durable
from letheon.eval.report.verdict import ORACLES, p_value


@dataclass(frozen=True)
class Options:
    """What to gather."""

    table: tuple[Path, ...]
    """Folders that `letheon evaluate --out` wrote."""
    runs: tuple[Path, ...]
    """Folder of the runs that are in each of them, in their order."""
    out: Path
    """CSV to write."""
    costs: Path | None = None
    """CSV of `tables.costs`, whose epochs of fine-tuning go to the rows of the same names."""


def count_images(run: Path) -> int | None:
    """Count the images that the training of a run read, each as often as it was; None without."""
    record = run / "run.json"
    if not record.is_file():
        return None
    phases = json.loads(record.read_text(encoding="utf-8"))["reads"]["phases"].values()
    return sum(phase["forget_reads"] + phase["retain_reads"] for phase in phases)


def verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The p-value of each model that was to forget, where the retrained ones suffice for it."""
    retrained = [row for row in rows if row["role"] == "retrained"]
    judged = [row for row in rows if row["role"] in ("unlearned", "control")]
    if len(retrained) < ORACLES:
        return {}
    return {row["name"]: p_value(row, retrained) for row in judged}


def read_table(table: Path, runs: Path) -> list[dict[str, str]]:
    """Read the rows of a table's CSV, with the two columns."""
    judged = verdicts(json.loads((table / "metrics.json").read_text(encoding="utf-8"))["rows"])
    with (table / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        images = count_images(runs / row["name"])
        row["verdict_p"] = f"{judged[row['name']]}" if row["name"] in judged else ""
        row["images_read"] = "" if images is None else str(images)
    return rows


def main(options: Options) -> None:
    """Join the tables, and each with the two columns."""
    rows: dict[str, dict[str, str]] = {}
    for table, runs in zip(options.table, options.runs, strict=True):
        for row in read_table(table, runs):
            rows.setdefault(row["name"], row)
    if options.costs is not None:
        with options.costs.open(newline="", encoding="utf-8") as lines:
            for one in csv.DictReader(lines):
                rows[one["name"]]["epochs_of_finetune"] = one["epochs_of_finetune"]
    text = io.StringIO()
    fields = dict.fromkeys(field for row in rows.values() for field in row)
    writer = csv.DictWriter(text, list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    durable.write(options.out, text.getvalue())


if __name__ == "__main__":
    main(tyro.cli(Options))
