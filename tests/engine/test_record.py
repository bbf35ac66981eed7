"""The run folder: written whole, never over another."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from letheon import durable
from letheon.engine.distributed import Ranks
from letheon.engine.runs.loggers import read_lines
from letheon.engine.runs.run_folder import (
    Record,
    check_free,
    check_free_file,
    settle_run,
    working_folder,
)
from letheon.errors import InputError, RunFailed
from letheon.eval.report.write import replace_tables, settle_tables
from letheon.folders import lock
from letheon.launch.records.claim import claim
from tests.house import ROOT
from tests.pool import on_ranks


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    check_free(tmp_path / "new" / "deeper", overwrite=False)
    check_free(tmp_path, overwrite=False)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="files that are no run"):
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


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def run_record(out: Path, number: int) -> None:
    """What a script writes: under the lock, from the check of the folder to its end."""
    with lock(out):
        settle_run(out)
        check_free(out, overwrite=True)
        record = Record(out, Ranks(), {"number": number})
        if number == 1:
            record.write("request.json", {"classes": [3]})
        record.log("phase", loss=float(number))
        record.log("phase", loss=float(number))
        record.finish(number=number)


class _Kill(BaseException):
    """The process dies; nothing it does after that reaches the disk."""


def kill_at(patch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Die at one of the calls that change the disk, counted from 0; returns the calls so far."""
    calls: list[str] = []

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) > call:
                raise _Kill
            return real(*args, **options)

        return act

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "pwrite", "ftruncate"):
        patch.setattr(os, name, dying(name, getattr(os, name)))
    return calls


def test_a_run_that_replaces_another_may_die_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards there is the old run, bit by bit, or the new one, whole; never a mixture."""
    calls: list[str] = []
    for call in range(200):
        out = tmp_path / str(call) / "run"
        run_record(out, 1)
        (out / "notes.txt").write_text("mine")
        old = content(out)
        try:
            with monkeypatch.context() as patch:
                calls = kill_at(patch, call)
                run_record(out, 2)
        except _Kill:
            with lock(out):
                settle_run(out)
        else:
            assert call == len(calls)
        state = content(out)
        if json.loads(state["run.json"])["number"] == 1:
            assert state == old
        else:
            assert state.keys() == old.keys() - {"request.json"}
            assert json.loads(state["settings.json"]) == {"number": 2}
            assert state["notes.txt"] == b"mine" and state["metrics.jsonl"].count(b"2.0") == 2
        run_record(out, 3)
        assert json.loads((out / "run.json").read_text()) == {"number": 3}
        assert [path.name for path in out.parent.iterdir()] == ["run"]
        if call == len(calls):
            break
    assert {"rename", "unlink", "fsync", "pwrite"} <= set(calls)
    assert call == len(calls) > 25


def test_an_unfinished_run_is_replaced_in_its_folder(tmp_path: Path) -> None:
    first = Record(tmp_path / "x", Ranks(), {})
    first.log("phase", loss=1.0)
    (tmp_path / ".x.new").mkdir()
    Record(tmp_path / "x", Ranks(), {})
    assert not (tmp_path / "x" / "metrics.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    first.write("run.json", {})
    assert working_folder(tmp_path / "x") == tmp_path / ".x.new"


def test_tables_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the evaluation is a run's folder, whose files stay."""

    def write_tables(out: Path, text: str) -> None:
        with lock(out):
            settle_tables(out)
            with replace_tables(out) as folder:
                folder.mkdir()
                durable.write(folder / "table.md", text)
                if text == "1":
                    durable.write(folder / "report.html", text)
                durable.write(folder / "evaluation.json", text)

    for call in range(100):
        out = tmp_path / str(call) / "table"
        write_tables(out, "1")
        (out / "run.json").write_text("{}")
        old = content(out)
        calls: list[str] = []
        try:
            with monkeypatch.context() as patch:
                calls = kill_at(patch, call)
                write_tables(out, "2")
        except _Kill:
            with lock(out):
                settle_tables(out)
        new = {"table.md": b"2", "evaluation.json": b"2", "run.json": b"{}"}
        assert content(out) in (old, new)
        if call == len(calls):
            break
    assert content(out) == new and call > 10


HOLD = """
import sys
from pathlib import Path
from letheon.folders import lock
with lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    command = [sys.executable, "-c", HOLD, str(out)]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    words = f"process {holder.pid} on {socket.gethostname()} is working on it"
    with pytest.raises(InputError, match=words) as caught, lock(out):
        pass
    assert caught.value.option == "out" and "\n" not in str(caught.value)
    with lock(tmp_path / "deep" / "other"):  # its neighbor is another matter
        pass
    holder.kill()
    holder.wait()
    with lock(out):  # a dead process leaves no lock behind, though its file is there
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), lock(out):
            pass
        assert (tmp_path / "deep" / ".run.lock").exists()
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_lock_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing here"), lock(tmp_path / "a" / "b" / "run"):
        raise InputError("nothing here")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), lock(tmp_path / "file" / "run"):
        pass


def test_file_systems_without_locks_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock(tmp_path / "run"):
        pass
    assert "has no locks (No locks available)" in capsys.readouterr().err


def claim_on(ranks: Ranks, out: str) -> str:
    """What a rank gets of a folder that another process holds, and of one that is free."""
    with claim([Path(out).with_name("free")], ranks):
        pass
    try:
        with claim([Path(out)], ranks):
            return "got it"
    except InputError as error:
        return str(error)


def test_every_rank_hears_of_a_refusal(tmp_path: Path) -> None:
    with lock(tmp_path / "run"):
        answers = on_ranks(2, claim_on, str(tmp_path / "run"))
    assert answers[0] == answers[1] and f"process {os.getpid()} on" in answers[0]


def test_a_full_disk_names_the_file_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "x.json"
    durable.write(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        words = r"No space left on device while writing .*x.json of 5,000 bytes, 1,000 bytes free: "
        with pytest.raises(RunFailed, match=words + "4,000 are missing"):
            durable.write(file, "x" * 5000)
    assert content(tmp_path) == {"x.json": b"old"}


def test_a_log_that_cannot_be_written_takes_no_run_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full in the middle of a line, then the folder gone, then both back."""
    out = tmp_path / "run"
    record = Record(out, Ranks(), {})
    record.log("phase", loss=1.0)
    with monkeypatch.context() as patch:
        real = os.pwrite

        def fill(handle: int, data: bytes, at: int) -> int:
            real(handle, data[:7], at)
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "pwrite", fill)
        record.log("phase", loss=2.0)
    record.log("phase", loss=3.0)
    out.rename(tmp_path / "away")
    record.log("phase", loss=4.0)
    (tmp_path / "away").rename(out)
    record.log("phase", loss=5.0)
    record.finish(weights="x")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 3.0, 5.0]
    assert json.loads((out / "run.json").read_text())["log_lines_missing"] == 2
    warning = "2 lines of metrics.jsonl could not be written (No space left on device)"
    assert warning in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    durable.write(file, "old")
    with pytest.raises(TypeError):
        durable.write(file, 3)  # type: ignore[arg-type]
    assert file.read_text() == "old"


def test_a_folder_that_goes_while_a_run_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the record knows is written again, and what it does not is counted."""
    out = tmp_path / "run"
    record = Record(out, Ranks(), {"seed": 1})
    record.write("request.json", {"text": "class:1"})
    record.log("phase", phase="retain", loss=1.0)
    record.log("phase", phase="retain", loss=0.5)
    shutil.rmtree(out)
    out.mkdir()  # as saving the weights does
    record.log("phase", phase="retain", loss=0.25)
    record.finish(weights="w", method="finetune")
    assert json.loads((out / "run.json").read_text())["log_lines_missing"] == 2
    assert json.loads((out / "request.json").read_text()) == {"text": "class:1"}
    assert [line["loss"] for line in read_lines(out / "metrics.jsonl")] == [0.25]
    said = capsys.readouterr().err
    assert "settings.json, versions.json, request.json had gone" in said
    assert "2 lines of metrics.jsonl could not be written (the file had gone)" in said
