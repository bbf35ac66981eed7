"""Rows of a comparison show themselves as the table, a frame and a page."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from letheon.errors import InputError
from letheon.eval.report.row_list import Rows

ROWS = [
    {"name": "original", "role": "original", "FA": 0.96, "RA": 0.98},
    {"name": "<b>salun</b>", "role": "unlearned", "FA": 0.125, "RA": 0.97},
]


def test_rows_are_a_list_that_prints_as_the_table() -> None:
    rows = Rows(ROWS, {"scrub": "no weights"})
    assert rows == ROWS and rows[1]["FA"] == 0.125
    text = str(rows).splitlines()
    assert text[0].split()[:4] == ["model", "FA", "%", "RA"] and "12.5" in text[3]
    assert "left out: scrub: no weights" in text
    page = rows._repr_html_()
    assert "<th>FA %</th>" in page and "<td>12.50</td>" in page and "scrub: no weights" in page
    assert "<b>" not in page and "&lt;b&gt;salun&lt;/b&gt;" in page
    assert str(Rows()) == "no rows" and Rows()._repr_html_() == "<p>no rows</p>"


def test_a_frame_has_the_numbers_of_the_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(read_csv=lambda file, **_: list(csv.DictReader(file)))
    monkeypatch.setitem(sys.modules, "pandas", fake)  # what it is asked for; itself an extra
    frame = Rows(ROWS).to_frame()
    assert [(row["name"], row["role"], row["FA"]) for row in frame] == [
        ("original", "original", "0.96"), ("<b>salun</b>", "unlearned", "0.125"),
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install 'pandas>="):
        Rows(ROWS).to_frame()


def test_pandas_itself_reads_it() -> None:
    pytest.importorskip("pandas")
    frame = Rows([*ROWS, {"name": "001", "FA": 0.5}, {"name": "NA", "FA": 0.25}]).to_frame()
    assert list(frame["name"]) == ["original", "<b>salun</b>", "001", "NA"]
    assert list(frame["FA"]) == [0.96, 0.125, 0.5, 0.25] and frame["RA"].isna().sum() == 2


def test_the_page_is_written(tmp_path: Path) -> None:
    page = Rows(ROWS).report(tmp_path / "report")
    assert page == tmp_path / "report" / "report.html"
    assert "&lt;b&gt;salun&lt;/b&gt;" in page.read_text(encoding="utf-8")
