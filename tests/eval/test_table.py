"""The printed table: the same cells in the terminal as in Markdown, with a legend."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from letheon.engine.distributed import Ranks
from letheon.eval.finished_rows import FinishedRows
from letheon.eval.report.rows import Prepared, prepare
from letheon.eval.report.tables import as_markdown, as_text
from letheon.eval.row_builder import Row

ROWS: list[dict[str, Any]] = [
    {
        "name": "original",
        "role": "original",
        "FA": 1.0,
        "RA": 0.98765,
        "TFA": None,
        "TRA": 0.5,
        "knn": 0.43219,
        "cka_original": 1.0,
        "seconds": 12.345,
    },
    {"name": "sal|un", "FA": 0.0, "RA": 0.9, "TFA": 0.0, "TRA": 0.45, "cka_original": -0.00049},
]


def prepared(rows: list[dict[str, Any]] = ROWS) -> Prepared:
    return prepare(rows)


def test_text_is_aligned_and_rounded() -> None:
    lines = as_text(prepared()).splitlines()
    assert " ".join(lines[0].split()) == "model FA % RA % TFA % TRA % k-NN % CKA orig time s"
    assert lines[2].split() == [
        "original", "100.00", "98.77", "–", "50.00", "43.22", "1.000", "12.3",
    ]  # fmt: skip
    assert lines[3].split() == ["sal|un", "0.00", "90.00", "0.00", "45.00", "–", "0.000", "–"]
    # Right edges of the numbers stand under one another.
    ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in lines[2:4]]
    assert ends[0][1:] == ends[1][1:]


def test_each_column_shown_has_a_line_of_legend() -> None:
    legend = as_text(prepared()).split("\n\n")[1].splitlines()
    assert len(legend) == 7
    assert legend[0].startswith("FA %")


def test_columns_nobody_has_are_left_out() -> None:
    assert "gap" not in as_text(prepared()).splitlines()[0]
    one = as_text(prepared([{"name": "a", "FA": 0.5}])).splitlines()[0]
    assert one.split() == ["model", "FA", "%"]


def test_models_left_out_are_named_below_the_table() -> None:
    text = as_text(prepare(ROWS, {"broken": "weights hold NaN"}))
    assert "left out: broken: weights hold NaN" in text.splitlines()


def test_markdown_has_the_cells_of_the_terminal() -> None:
    lines = [line for line in as_markdown(prepared()).splitlines() if line.startswith("|")][:4]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {9}
    assert lines[3].startswith("| sal\\|un | 0.00 |")
    cells = [re.split(r"\s*(?<!\\)\|\s*", line)[1:-1] for line in (lines[0], *lines[2:])]
    text = as_text(prepared()).splitlines()
    for marked, plain in zip(cells, (text[0], *text[2:4]), strict=True):
        assert [cell.replace("\\|", "|") for cell in marked] == re.split(r"\s{2,}", plain)


def test_conditions_are_printed_where_all_rows_share_them() -> None:
    under = {
        "ks": [20, 5],
        "metric": "l2",
        "weights": "temperature",
        "temperature": 0.1,
        "space": "logits",
        "split": "legacy",
        "cka": "exact",
    }
    rows = [{**row, "conditions": under} for row in ROWS]
    want = (
        "k-NN: k = 20, l2, temperature 0.1 votes, logits as features, legacy 80/20 split. "
        "CKA: exact."
    )
    assert as_text(prepared(rows)).splitlines()[-1] == want
    assert "- " + want in as_markdown(prepared(rows)).splitlines()
    rows[0] = {**rows[0], "conditions": {**under, "metric": "cosine"}}
    assert want not in as_text(prepared(rows))


def test_finished_rows_come_back_as_they_were_or_not_at_all(tmp_path: Path) -> None:
    rows, margins = FinishedRows(tmp_path / "rows", Ranks()), torch.tensor([0.1, -3.0]).double()
    values = {"FA": 0.1 + 0.2, "counts": {"FA": [1, 3]}, "plug-in": np.float32(0.5)}
    values["cka_by_layer"] = {"stem": 1.0, "net.1": 0.5, "features": 0.25}  # drawn in this order
    row = Row("a", seed=3, values=values, why={"idi": "none"})
    rows.save({"weights": "w"}, row, margins)
    wanted = {"a": {"weights": "w"}, "b": {"weights": "v"}}
    found = rows.load(wanted)
    assert list(found) == ["a"] and found["a"].row.as_dict() == row.as_dict()
    assert list(found["a"].row.values["cka_by_layer"]) == ["stem", "net.1", "features"]
    assert found["a"].margins is not None and torch.equal(found["a"].margins, margins)
    (file,) = (tmp_path / "rows").iterdir()
    file.write_text(file.read_text(encoding="utf-8").replace("0.30000000000000004", "0.31"))
    assert rows.load(wanted) == {}
    rows.remove()
    assert not (tmp_path / "rows").exists()
