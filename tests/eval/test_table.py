"""The printed table: per cent, three decimals for CKA, a dash for what is not defined."""

from __future__ import annotations

import re

from letheon.eval.report import terminal

ROWS = [
    {
        "name": "original",
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


def test_plain_table_is_aligned_and_rounded() -> None:
    lines = terminal.plain(ROWS).splitlines()
    assert " ".join(lines[0].split()) == "model FA % RA % TFA % TRA % k-NN % CKA orig time s"
    assert lines[2].split() == ["original", "100.0", "98.8", "-", "50.0", "43.2", "1.000", "12.3"]
    assert lines[3].split() == ["sal|un", "0.0", "90.0", "0.0", "45.0", "-", "0.000", "-"]
    # Right edges of the numbers stand under one another.
    ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in lines[2:4]]
    assert ends[0][1:] == ends[1][1:]


def test_each_column_shown_has_a_line_of_legend() -> None:
    text = terminal.plain(ROWS)
    legend = text.split("\n\n")[1].splitlines()
    assert len(legend) == 7
    assert legend[0].startswith("FA %")


def test_columns_nobody_has_are_left_out() -> None:
    assert "gap" not in terminal.plain(ROWS).splitlines()[0]
    assert terminal.plain(ROWS, ["FA"]).splitlines()[0].split() == ["model", "FA", "%"]
    assert terminal.plain([]).splitlines()[0] == "model"


def test_markdown_has_as_many_cells_in_each_row() -> None:
    lines = terminal.markdown(ROWS).split("\n\n")[0].splitlines()
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {9}
    assert lines[3].startswith("| sal\\|un | 0.0 |")


def test_every_column_has_a_definition_with_its_source() -> None:
    meant = terminal.definitions()
    assert set(terminal.COLUMNS) <= set(meant)
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in meant.values())


def test_conditions_are_told_where_all_rows_share_them() -> None:
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
    assert terminal.plain(rows).splitlines()[-1] == want
    assert terminal.markdown(rows).splitlines()[-1] == "- " + want
    rows[0] = {**rows[0], "conditions": {**under, "metric": "cosine"}}
    assert want not in terminal.plain(rows)
