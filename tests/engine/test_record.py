"""The run folder: written whole, never over another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from letheon import durable
from letheon.engine.distributed import Ranks
from letheon.engine.runs.run_folder import Record, check_free, check_free_file
from letheon.errors import InputError


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    check_free(tmp_path / "new" / "deeper", overwrite=False)
    check_free(tmp_path, overwrite=False)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="an unfinished run"):
        check_free(tmp_path, overwrite=False)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="a finished run"):
        check_free(tmp_path, overwrite=False)
    check_free(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="it is a file"):
        check_free(tmp_path / "run.json", overwrite=True)
    with pytest.raises(InputError, match="cannot be written"):
        check_free(tmp_path / "run.json" / "below", overwrite=False)
    with pytest.raises(InputError, match="it is a folder"):
        check_free_file(tmp_path, overwrite=True)


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    record = Record(tmp_path / "second", Ranks(rank=1, world=2), {"a": 1})
    record.log("phase", loss=1.0)
    record.finish(weights="x")
    assert not (tmp_path / "second").exists()
    record = Record(tmp_path / "first", Ranks(rank=0, world=2), {"a": 1})
    record.log("phase", loss=1.0)
    record.log("phase", loss=float("nan"))
    record.finish(weights="x")
    lines = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["phase", "phase"]
    assert json.loads((tmp_path / "first" / "run.json").read_text()) == {"weights": "x"}
    assert json.loads((tmp_path / "first" / "settings.json").read_text()) == {"a": 1}


def test_a_new_record_leaves_nothing_of_the_old_run(tmp_path: Path) -> None:
    first = Record(tmp_path, Ranks(), {})
    first.log("phase", loss=1.0)
    first.finish()
    Record(tmp_path, Ranks(), {})
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "run.json").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    durable.write(file, "old")
    with pytest.raises(TypeError):
        durable.write(file, 3)  # type: ignore[arg-type]
    assert file.read_text() == "old"
