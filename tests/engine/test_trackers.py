"""Trackers, with packages of our own making in the places of the real ones."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from letheon.engine.distributed import Ranks
from letheon.engine.runs import loggers
from letheon.engine.runs.loggers import TrackingOptions, report_numbers
from letheon.engine.runs.run_folder import Record
from letheon.errors import InputError, RunFailed

LINES: list[dict[str, Any]] = [
    {"kind": "phase", "phase": "retain", "epoch": 0, "loss": 2.5, "clean": True, "text": "x"},
    {"kind": "note", "text": "no numbers"},
    {"kind": "after epoch", "epoch": 0, "ra": math.nan, "fa": 0.25},
]
EXPECTED = [
    (0, {"retain/epoch": 0.0, "retain/loss": 2.5}),
    (2, {"after epoch/epoch": 0.0, "after epoch/fa": 0.25}),
]


class Hosted:
    """What wandb.init and trackio.init return."""

    def __init__(self, calls: list[Any], fails: str):
        self.calls, self.fails = calls, fails

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.fails == "log":
            raise ConnectionError("no\nroute")
        self.calls.append((step, numbers))

    def finish(self) -> None:
        if self.fails == "finish":
            raise OSError("gone")
        self.calls.append("end")


def fake_package(name: str, calls: list[Any], fails: str = "") -> ModuleType:
    module = ModuleType(name)

    def init(**options: Any) -> Hosted:
        if fails == "init":
            raise RuntimeError("not logged in")
        json.dumps(options["config"])
        calls.append(options["name"])
        return Hosted(calls, fails)

    module.init = init  # type: ignore[attr-defined]
    return module


def fake_mlflow(calls: list[Any]) -> ModuleType:
    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return name

        def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
            calls.append(run_name)
            self.step, self.numbers = -1, dict[str, float]()
            return SimpleNamespace(info=SimpleNamespace(run_id="id"))

        def log_dict(self, run: str, content: dict[str, Any], file: str) -> None:
            json.dumps(content)

        def log_metric(self, run: str, name: str, value: float, step: int) -> None:
            if step != self.step:
                self.step, self.numbers = step, {}
                calls.append((step, self.numbers))
            self.numbers[name] = value

        def set_terminated(self, run: str) -> None:
            calls.append("end")

    module = ModuleType("mlflow")
    module.MlflowClient = Client  # type: ignore[attr-defined]
    return module


def fake_writer(calls: list[Any]) -> ModuleType:
    class SummaryWriter:
        def __init__(self, folder: str):
            calls.append(Path(folder).parent.name)
            assert Path(folder).name == "tensorboard"
            self.step = -1

        def add_text(self, name: str, text: str) -> None:
            json.loads(text)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if step != self.step:
                self.step = step
                calls.append((step, {}))
            calls[-1][1][name] = value

        def close(self) -> None:
            calls.append("end")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    return module


def record(out: Path, tracker: str, fail: bool = False) -> list[dict[str, Any]]:
    """A run folder's lines, written while a tracker listens."""
    run = Record(out, Ranks(), {"tracking": {"tracker": tracker}, "out": out})
    for line in LINES:
        run.log(**line)
    if fail:
        run.fail(RunFailed("a reason"))
    else:
        run.finish()
    text = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in ("kind", "loss")} for line in text]


PLAIN = [{"kind": "phase", "loss": 2.5}, {"kind": "note"}, {"kind": "after epoch"}]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "tensorboard"])
def test_the_numbers_reach_each_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[Any] = []
    if name == "mlflow":
        monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(calls))
    elif name == "tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake_writer(calls))
    else:
        monkeypatch.setitem(sys.modules, name, fake_package(name, calls))
    assert record(tmp_path / "run", name) == PLAIN
    assert calls == ["run", *EXPECTED, "end"]
    assert record(tmp_path / "failed", name, fail=True) == PLAIN
    assert calls[-1] == "end" and calls.count("end") == 2


@pytest.mark.parametrize("fails", ["init", "log", "finish", "import"])
def test_a_tracker_that_fails_takes_no_run_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    package = None if fails == "import" else fake_package("wandb", [], fails)
    monkeypatch.setitem(sys.modules, "wandb", package)
    assert record(tmp_path / "run", "wandb") == PLAIN
    assert (tmp_path / "run" / "run.json").exists()
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("warning: wandb takes no more numbers")


def test_which_tracker_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake_writer(calls))
    there: set[str] = set()
    monkeypatch.setattr(loggers, "find_spec", lambda name: name if name in there else None)
    record(tmp_path / "a", "auto")
    record(tmp_path / "b", "none")
    assert calls == []
    with pytest.raises(
        InputError, match=r"not installed; expected it; pip install 'mlflow-skinny>=2\.20'$"
    ):
        TrackingOptions(tracker="mlflow").check()
    there.add("tensorboard")
    record(tmp_path / "c", "auto")
    assert calls[0] == "c" and TrackingOptions().tracker == "auto"


def test_a_run_that_goes_on_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_package("wandb", calls))
    settings = {"tracking": {"tracker": "wandb"}}
    Record(tmp_path / "run", Ranks(), settings).log("phase", loss=1.0)
    Record(tmp_path / "run", Ranks(), settings, resume=True).log("phase", loss=0.5)
    assert [call for call in calls if call != "run"] == [
        (0, {"phase/loss": 1.0}),
        (1, {"phase/loss": 0.5}),
    ]


def test_names_and_numbers() -> None:
    within = {"kind": "steps", "phase": "retain", "loss": 1.5}
    assert report_numbers(within) == {"retain/steps/loss": 1.5}  # not the pass's mean
    assert [report_numbers(line) for line in LINES] == [EXPECTED[0][1], {}, EXPECTED[1][1]]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_tensorboard_itself(tmp_path: Path) -> None:
    assert record(tmp_path / "run", "tensorboard") == PLAIN
    assert list((tmp_path / "run" / "tensorboard").iterdir())
