"""A finished table is given back only where it is whole and was made of the same."""

from __future__ import annotations

import json
from pathlib import Path

from letheon.launch.records.tables import FILES, ORIGIN, file_digests, read_same_table


def test_a_table_that_was_changed_or_made_of_something_else_is_none(tmp_path: Path) -> None:
    rows = {"metrics.json": '{"rows": [{"name": "a"}], "left_out": {"b": "why"}}', "table.md": "a"}
    for name, text in rows.items():
        (tmp_path / name).write_text(text)
    files = [tmp_path / name for name in rows]
    mark = {ORIGIN: "digest", FILES: file_digests(files), "request": {}}
    (tmp_path / "evaluation.json").write_text(json.dumps(mark))
    found = read_same_table(tmp_path, "digest")
    assert found is not None and found.rows == [{"name": "a"}] and found.left_out == {"b": "why"}
    assert sorted(found.files) == sorted(files)
    assert read_same_table(tmp_path, "another") is None
    (tmp_path / "table.md").write_text("b")
    assert read_same_table(tmp_path, "digest") is None
    (tmp_path / "table.md").unlink()
    assert read_same_table(tmp_path, "digest") is None
    (tmp_path / "evaluation.json").write_text(json.dumps({ORIGIN: "digest"}))  # as before this
    assert read_same_table(tmp_path, "digest") is None
    (tmp_path / "evaluation.json").write_text("no JSON")
    assert read_same_table(tmp_path, "digest") is None
