"""The scripts are stopped by signals and go on by the same line: exit codes, refusals, weights."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from letheon.engine.runs import plan, several
from letheon.engine.runs.stop import STOPPED, Poll, Stopped, last_signal
from tests.launch_tools import Scripts, start_script
from tests.pool import start_process

TRAIN = ("--data", "digits", "--model", "small", "--epochs", "2", "--lr", "0.05", "--device", "cpu")


def weights_of(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["weights"])


def lines_of(folder: Path) -> list[tuple[object, ...]]:
    """What every line of the record says, but for its times, and notes on free memory."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    keys = ("kind", "text", "epoch", "phase", "loss", "forget_read", "retain_read", "lr")
    return [tuple(line.get(key) for key in keys) for line in lines if line["kind"] != "note"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Scripts:
    return Scripts(monkeypatch, capsys)


def stop_after(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Stop the next runs after so many steps, a step after they were saved."""

    class Breaks(Poll):
        taken = 0

        def after_step(self, *broken: Callable[[], bool]) -> int:
            self.taken += 1
            if self.taken > last:
                raise Stopped("on purpose")
            return super().after_step(*broken)

    for module in (plan, several):
        monkeypatch.setattr(module, "Poll", Breaks)


def newest_state(folder: Path) -> str:
    return max((file.name for file in folder.glob("state/*.json")), default="")


class Waits(Poll):
    """Waits for a signal after the fifth step, when a state was saved."""

    taken = 0

    def after_step(self, *broken: Callable[[], bool]) -> int:
        self.taken += 1
        while self.taken == 5 and not last_signal():
            time.sleep(0.01)
        return super().after_step(*broken)


def train_and_wait(*args: object) -> None:
    plan.Poll = Waits  # type: ignore[misc]
    start_script("train", *args)


def start_and_wait(out: Path, err: Path, *args: str) -> Any:
    """A process of its own, once it has saved a state that was not there before."""
    before = newest_state(out)
    process = start_process(train_and_wait, *args, "--out", out, err=err)
    while newest_state(out) <= before:
        assert process.is_alive(), err.read_text()
        time.sleep(0.02)
    return process


def test_a_killed_and_a_stopped_process(tmp_path: Path, scripts: Scripts) -> None:
    args = (*TRAIN, "--save-every", "3steps")
    killed = start_and_wait(tmp_path / "run", tmp_path / "killed", *args)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    stopped = start_and_wait(tmp_path / "run", tmp_path / "stopped", *args)
    stopped.terminate()
    stopped.join()
    err = (tmp_path / "stopped").read_text()
    assert stopped.exitcode == STOPPED, err
    assert "Traceback" not in err and err.count("stopped: ") == 1
    assert scripts("train", *args, "--out", tmp_path / "run").code == 0
    assert scripts("train", *TRAIN, "--out", tmp_path / "whole").code == 0
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    assert not (tmp_path / "run" / "state").exists()
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["resumed"]) == 2


def test_only_the_same_run_goes_on(
    tmp_path: Path, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (*TRAIN, "--out", tmp_path / "run", "--save-every", "2steps")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        ended = scripts("train", *args)
        assert ended.code == STOPPED and "on purpose" in ended.err
    other = [arg if arg != "0.05" else "0.01" for arg in args]
    ended = scripts("train", *other)
    assert ended.code == 2
    assert "method.recipe.lr 0.05 before, 0.01 now" in ended.err
    assert "goes on with the unfinished run" not in ended.err
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        ended = scripts("train", *other, "--resume-anyway")
        assert ended.code == STOPPED
        assert "overlooked: method.recipe.lr 0.05 before, 0.01 now" in ended.err
    assert scripts("train", *args, "--overwrite").code == 0  # of what it was not: from the start
    assert "resumed" not in json.loads((tmp_path / "run" / "run.json").read_text())
    weights = (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns
    again = scripts("train", *args, "--compile-file", tmp_path / "code")  # changes no result
    assert again.code == 0 and "already done by the same command" in again.err
    assert (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns == weights
    other_again = scripts("train", *other)
    assert other_again.code == 2 and "a finished run that differs" in other_again.err


def test_a_damaged_state_is_named(
    tmp_path: Path, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (*TRAIN, "--out", tmp_path / "run", "--save-every", "1step")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert scripts("train", *args).code == STOPPED
    file = tmp_path / "run" / "state" / "000004.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    ended = scripts("train", *args)
    assert ended.code == 0 and "000004.json is damaged" in ended.err
    assert scripts("train", *TRAIN, "--out", tmp_path / "whole").code == 0
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


@pytest.mark.slow
def test_several_runs_go_on(
    tmp_path: Path, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is finished, one has begun and one has not, when the process is stopped."""
    original = tmp_path / "original"
    assert scripts("train", *TRAIN[:5], "1", *TRAIN[6:], "--out", original).code == 0
    args = ("--weights", original, "--data", "digits", "--forget", "class:3", "--device", "cpu")
    methods = ("finetune", "--epochs", "1", "+", "spkd", "--epochs", "3", "--lr", "0.001")
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        ended = scripts(
            "forget", *args, "--out", tmp_path / "s", "--save-every", "3steps", *methods
        )
        assert ended.code == STOPPED, ended.err
    states = {name: (tmp_path / "s" / name / "run.json").exists() for name in ("finetune", "spkd")}
    assert states == {"finetune": True, "spkd": False}
    again = scripts("forget", *args, "--out", tmp_path / "s", "--save-every", "3steps", *methods)
    assert again.code == 0 and "finished before, and left out: finetune" in again.err
    assert scripts("forget", *args, "--out", tmp_path / "whole", *methods).code == 0
    for name in states:
        assert weights_of(tmp_path / "s" / name) == weights_of(tmp_path / "whole" / name)
        assert lines_of(tmp_path / "s" / name) == lines_of(tmp_path / "whole" / name)
    once_more = scripts("forget", *args, "--out", tmp_path / "s", *methods)
    assert once_more.code == 0 and "all 2 already done" in once_more.err
