"""`letheon tune`: settings are found, the study resumes, and what is measured is not read."""

from __future__ import annotations

import json
import signal
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from letheon.engine.distributed import Ranks
from letheon.engine.method import Method
from letheon.engine.runs import stop
from letheon.errors import InputError, RunFailed
from letheon.launch import forget
from letheon.launch.tuning import search as tune_search
from letheon.launch.tuning import tune
from letheon.launch.tuning.objective import Target, divide, target_without
from letheon.launch.tuning.ranges import Range, choose_ranges, replace_settings
from letheon.launch.tuning.recipe_file import format_recipe, read_recipe
from letheon.launch.tuning.search import Study
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import forget_mask, resolve
from letheon.methods.finetune import Finetune
from letheon.methods.fisher import Fisher
from letheon.methods.random_label import RandomLabel
from letheon.methods.salun import SalUn
from letheon.methods.scrub import Scrub
from letheon.methods.ssd import Ssd
from tests.launch_tools import Scripts, start_script
from tests.patience import wait_for
from tests.pool import start_process
from tests.world import images

DATA = Data(images(), images(20), tuple((f"c{c}",) for c in range(4)))


def test_what_is_measured_is_not_read() -> None:
    """Every image is on one side; single samples to forget, which nothing stands for, on both."""
    for text in ("class:2", "random-samples:20%"):
        request = resolve(text, DATA, 1)
        flags = forget_mask(request, DATA.train.labels)
        part = divide(DATA, flags, request, 0.2, 1)
        read, measured = part.data.train.numbers, part.data.test.numbers  # type: ignore[attr-defined]
        assert set(read) | set(measured) == set(range(41))
        both = set(read) & set(measured)
        assert both == (set(np.flatnonzero(flags)) if text.startswith("random") else set())
        assert (part.forget == flags[measured]).all() and part.forget.any()
        assert (forget_mask(part.request, part.data.train.labels) == flags[read]).all()
        for label in range(4):
            assert (part.data.test.labels[~part.forget] == label).any() or label == 2
        again = divide(DATA, flags, request, 0.2, 1).data.test.numbers  # type: ignore[attr-defined]
        assert (again == measured).all()
    with pytest.raises(InputError, match="between 0 and 1"):
        divide(DATA, flags, request, 1.0, 1)


def test_gaps() -> None:
    assert Target(0.1, 0.9, True, "").gap(0.3, 1.0) == pytest.approx(0.15)
    assert Target(0.1, 0.9, False, "").gap(0.3, 1.0) == pytest.approx(0.1)
    assert target_without((1.0, 0.95), None, None).gap(0.0, 0.95) == 0
    assert target_without((1.0, 0.95), 0.8, None).forget == 0.8
    assert target_without((1.0, 0.95), 0.8, 0.3).forget == 0.3


def test_ranges_are_the_methods_own_or_the_users() -> None:
    salun = SalUn(RandomLabel(), density=0.4)
    names = {one.name: one for one in choose_ranges("", salun)}
    assert names.keys() == {"lr", "density"} and names["lr"].log and not names["density"].log
    assert [one.name for one in choose_ranges("", Ssd())] == ["alpha"]
    assert [one.name for one in choose_ranges("", Fisher())] == ["alpha", "limit"]
    ranges = choose_ranges("lr=1e-3:0.1, epochs=1:9,order=mixed|paired", salun)
    assert [one.whole for one in ranges] == [False, True, False]
    new = replace_settings(salun, {"lr": 0.5, "epochs": 3, "order": "paired", "density": 0.1})
    assert new.inner.recipe.lr == 0.5 and new.inner.recipe.epochs == 3
    assert (new.inner.order, new.density) == ("paired", 0.1) and new.inner.draw == salun.inner.draw
    for text, words in {
        "rate=1:2": "got a range of 'rate'", "lr=2:1": "two numbers",
        "epochs=1:2.5": "whole numbers",
        "lr=1:2,lr=1:3": "each setting once", "lr": "two numbers",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words):
            choose_ranges(text, salun)
    with pytest.raises(InputError, match="declares none"):
        choose_ranges("", Finetune(replace_settings(Finetune().recipe, {"epochs": 0})))


@pytest.mark.parametrize("method", [SalUn(RandomLabel(), density=0.25), Scrub(rewind=True)])
def test_a_recipe_is_written_as_it_is_read(method: Method, tmp_path: Path) -> None:
    from letheon.engine.runs.plan import describe

    facts = {"set": 'a "set"\\', "model": "m", "request": "any", "status": "tuned", "source": "é"}
    file = tmp_path / "one.toml"
    file.write_text(format_recipe(facts, describe(method)))
    assert {k: v for k, v in tomllib.loads(file.read_text()).items() if k != "method"} == facts
    words = ["--weights", "w", "--forget", "class:1", "--out", "o", "--recipe", str(file)]
    assert forget.read(words)[0].method == method


def search(scripts: Scripts, original: Path, out: Path, *words: object) -> dict[str, Any]:
    base = ("--weights", original, "--out", out)
    ended = scripts("tune", *base, *words)
    assert ended.code == 0, ended.err
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_a_search_finds_what_forgets_and_goes_on(
    scripts: Scripts, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")
    out = tmp_path / "out"
    words = ("--forget", "class:3", "--ranges", "lr=1e-3:0.1", "--seeds", "1,2")
    method = ("random-label", "--lr", "0.03", "--epochs", "2")
    first = search(scripts, original, out, *words, "--trials", 1, *method)
    assert len(first["trials"]) == 1 and first["trials"][0]["values"]["lr"] == 0.03
    assert first["target"]["forget"] == 0 and "no retrained model" in first["knowledge"]
    with monkeypatch.context() as signal:
        signal.setattr(stop.Poll, "after_step", lambda poll, *_: stop.STOP)
        again = ("tune", "--weights", original, "--out", out, *words, "--trials", 3, *method)
        ended = scripts(*again)
        ssd = scripts("tune", "--weights", original, "--out", tmp_path / "ssd", *words[:2], "ssd")
    assert ended.code == stop.STOPPED and "stopped: within trials, which are made" in ended.err
    assert ssd.code == stop.STOPPED and "trial 0 seed 1: in its preparation, which" in ssd.err
    report = search(scripts, original, out, *words, "--trials", 3, "--at-once", 2, *method)
    assert report["trials"][:1] == first["trials"] and len(report["trials"]) == 3
    assert all(set(row["runs"]) == {"1", "2"} for row in report["trials"] if row["gap"] is not None)
    best = report["best"]
    assert best["gap"] == min(r["gap"] for r in report["trials"] if r["state"] == "complete")
    gaps = [one["gap"] for one in best["runs"].values()]
    assert best["gap"] == pytest.approx(sum(gaps) / 2)
    assert best["gap"] <= report["trials"][0]["gap"]
    recipe = read_recipe(str(out / "recipe.toml"))
    assert recipe.facts["knowledge"] == report["knowledge"]
    ended = scripts(
        "forget", "--weights", original, "--forget", "class:3", "--out", tmp_path / "run",
        "--recipe", out / "recipe.toml",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert kept["method"]["recipe"]["lr"] == best["values"]["lr"]
    ended = scripts("tune", "--weights", original, "--out", out, "--forget", "class:4", *method)
    assert ended.code == 2 and "holds a search with" in ended.err


def test_a_search_that_another_process_begins_is_joined(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    """Which has made its lock and not its study yet; any other file is refused."""
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")
    words = ("--forget", "class:3", "--ranges", "lr=1e-3:0.1", "--trials", 1, "finetune")
    out = tmp_path / "begun"
    out.mkdir()
    (out / "study.lock").touch()
    assert len(search(scripts, original, out, *words, "--epochs", "1")["trials"]) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    ended = scripts("tune", "--weights", original, "--out", tmp_path / "other", *words)
    assert ended.code == 2 and "files that are no run (notes)" in ended.err


@pytest.mark.slow
def test_processes_share_a_search_and_one_may_be_killed(original: Path, tmp_path: Path) -> None:
    """Begun together, they run as many trials as asked for; the killed one's is not counted."""
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")
    words = (
        "tune", "--weights", original, "--out", tmp_path / "out", "--forget", "class:3",
        "--ranges", "lr=1e-3:0.1", "--trials", "5", "--at-once", "1",
        "random-label", "--lr", "0.03", "--epochs", "3",
    )  # fmt: skip
    files = [tmp_path / f"{name}.err" for name in "abc"]
    several = [start_process(start_script, *map(str, words), err=file) for file in files]
    wait_for(
        lambda: files[0].exists() and "epoch 1/3" in files[0].read_text(), "a first trial under way"
    )
    several[0].kill()
    for one in several:
        one.join()
    assert [one.exitcode for one in several] == [-signal.SIGKILL, 0, 0], files[1].read_text()
    study = tune_search.load_optuna().load_study(
        study_name="letheon", storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}"
    )
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") + states.count("PRUNED") == 5
    assert states.count("RUNNING") + states.count("FAIL") <= 1  # the killed one's
    assert len({str(trial.params) for trial in study.trials}) == len(states)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["trials"]) == 5


def test_a_trial_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    """Neither one that its process has closed, nor one of a dead process with our number."""
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")
    ranges, start = [Range("lr", 0.1, 1.0)], {"lr": 0.5}

    def propose(study: Study) -> list[dict[str, Any]]:
        return [trial.values for trial in study.ask(2, 1, ranges, start)]

    study = Study(tmp_path / "study.db", {}, Ranks(), 1)
    assert propose(study) == [start] and propose(study) == []
    study.close_open()
    assert propose(study) == [start]
    assert propose(Study(tmp_path / "study.db", {}, Ranks(), 1)) == [start]


def test_a_failed_trial_beside_one_that_was_stopped_is_not_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = SimpleNamespace(
        number=0, params={}, value=1.0, state=SimpleNamespace(name="COMPLETE"),
        user_attrs={"runs": {"1": {"failed": "not finite"}}},
    )  # fmt: skip
    pruned = SimpleNamespace(
        number=1, params={}, value=0.4, state=SimpleNamespace(name="PRUNED"), user_attrs={}
    )
    images = SimpleNamespace(train=[], test=[])
    case: Any = SimpleNamespace(
        settings=SimpleNamespace(out=tmp_path), facts={},
        division=SimpleNamespace(data=images, forget=np.zeros(0, bool)),
    )  # fmt: skip
    trials = [failed, pruned]
    study: Any = SimpleNamespace(list_finished=lambda: trials)
    with pytest.raises(RunFailed, match="no trial that was run to its end, of 2"):
        tune.report(case, Target(0.0, 1.0, False, ""), study)
    assert "1 trials failed, the last one: not finite" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["best"] is None
    del trials[1]
    with pytest.raises(RunFailed, match="got 1 trials, which all failed"):
        tune.report(case, Target(0.0, 1.0, False, ""), study)


def test_a_search_by_a_retrained_model_and_what_it_refuses(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")
    request = ("--forget", "random-samples:5%")
    retrain = ("--weights", original, *request, "--out", tmp_path / "retrain", "retrain")
    assert scripts("forget", *retrain, "--epochs", 2, "--lr", 0.1).code == 0
    words = (*request, "--trials", 2, "--retrained", tmp_path / "retrain")
    report = search(scripts, original, tmp_path / "a", *words, "finetune", "--epochs", 1)
    assert report["knowledge"].startswith("the retrained model")
    wild = ("--ranges", "lr=1e18:1e20", "--forget", "class:3", "--trials", 1)
    begin = ("tune", "--weights", original, "--out", tmp_path / "b")
    ended = scripts(*begin, *wild, "grad-ascent", "--epochs", 2)
    assert ended.code == 3 and "got 1 trials, which all failed, the last one: " in ended.err
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["best"] is None and report["trials"][0]["gap"] == 1
    assert not (tmp_path / "b" / "recipe.toml").exists()
    for words, expected in {
        ("--forget", "class:3", "--retrained", tmp_path / "retrain"): "--retrained: got",
        ("--forget", "class:3", "--seeds", "1,1"): "--seeds: got",
        ("--forget", "class:3", "--trials", "0"): "--trials: got",
        ("--forget", "class:3", "--ranges", "rate=1:2"): "--ranges: got",
    }.items():
        ended = scripts("tune", "--weights", original, "--out", tmp_path / "x", *words, "finetune")
        assert ended.code == 2 and expected in ended.err, ended.err
