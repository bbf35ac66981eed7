"""`evaluate --depth full` from end to end: rows, files, cache, ranks, models that diverged."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from letheon.engine.checkpoints.model_file import load_model, save_model
from letheon.engine.distributed import Ranks
from letheon.engine.recipe import Recipe
from letheon.engine.runs.run_folder import Record
from letheon.errors import NotMeasurable, RunFailed
from letheon.eval.attacks import session
from letheon.eval.attacks.result_store import Result, ResultStore
from letheon.eval.attacks.suite import Attack
from letheon.eval.evaluate import Extent, Measuring
from letheon.eval.finished_rows import FinishedRows
from letheon.eval.inference.cache import stored_outputs
from letheon.eval.probes.relearn import RelearnCurve
from letheon.launch import evaluate, forget
from letheon.methods.head_distillation import HeadDistillation
from letheon.methods.retrain import Retrain
from tests.launch_tools import ROOT, Scripts, script_on
from tests.pool import on_ranks

SCHEMA = json.loads((ROOT / "docs" / "metrics.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two retrained models and a head distillation, which forgot the digits 3 and 8."""
    folder = tmp_path_factory.mktemp("runs")
    training = Retrain(Recipe(epochs=6, lr=0.1, schedule="cosine"))
    methods = {
        "retrain-2": (2, training),
        "retrain-3": (3, training),
        "head": (1, HeadDistillation(Recipe(epochs=4, lr=0.1, weight_decay=0.0))),
    }
    for name, (seed, method) in methods.items():
        settings = forget.Settings(
            weights=original, forget="class:3,8", out=folder / name, method=method, seed=seed
        )
        forget.main(settings, Ranks())
    return {name: folder / name for name in methods}


def arguments(original: Path, runs: dict[str, Path], depth: str = "full") -> list[object]:
    return [
        "--original", original, "--retrained", runs["retrain-2"], runs["retrain-3"],
        "--runs", runs["head"], "--downstream", "digits", "--random-control",
        "--device", "cpu", "--attacks", 10, "--depth", depth,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(
    original: Path, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a full evaluation, with a cache beside it."""
    out = tmp_path_factory.mktemp("full") / "table"
    settings = evaluate.Settings(
        original=original, retrained=(runs["retrain-2"], runs["retrain-3"]), runs=(runs["head"],),
        downstream="digits", random_control=True, out=out,
        extent=Extent(depth="full", relearn=10, attacks=10, cache=out.parent / "cache"),
    )  # fmt: skip
    evaluate.main(settings, Ranks())
    return out


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    document = json.loads((folder / "metrics.json").read_text())
    jsonschema.validate(document, SCHEMA)
    return {row["name"]: row for row in document["rows"]}


@pytest.mark.slow
def test_a_full_table_exposes_head_distillation(written: Path) -> None:
    rows = rows_of(written)
    assert [(name, row["role"]) for name, row in rows.items()] == [
        ("original", "original"), ("retrain-2", "retrained"), ("retrain-3", "retrained"),
        ("random", "control"), ("head", "control"),
    ]  # fmt: skip
    head, retrained = rows["head"], rows["retrain-3"]
    # By its answers it forgot,
    assert head["FA"] < 0.02 and head["TRA"] > 0.8 and head["tow"] > 0.6
    assert head["svc_efficacy_confidence"] > 0.95
    # by its features it is the original.
    assert head["cka_original"] == pytest.approx(1)
    assert retrained["cka_original"] < 0.95
    assert head["idi"] == pytest.approx(1) and abs(retrained["idi"]) < 0.8
    # By their ideals, measures rank a retrained model before the original and an untrained one.
    untrained, before = rows["random"], rows["original"]
    assert abs(retrained["idi"]) < abs(untrained["idi"]) < abs(head["idi"])
    for key in ("agr", "completeness"):
        assert retrained[key] > before[key] > untrained[key], key
    published = "svc_efficacy_probabilities_published"
    assert retrained[published] < head[published] <= before[published]
    assert all(v == pytest.approx(w) for v, w in zip(
        head["cka_by_layer"].values(), rows["original"]["cka_by_layer"].values(), strict=True
    ))  # fmt: skip
    for key in ("probe_forgotten", "probe_few_shot", "knn"):
        assert head[key] == rows["original"][key]
    assert head["knn_confusion"] == rows["original"]["knn_confusion"]
    assert head["relearn"]["whole network"]["steps"][-1] == 10
    assert len(head["domain_matrix"]) == len(head["domain_matrix"]["ink"]) > 1
    assert head["conditions"]["digest"] != rows["original"]["conditions"]["digest"]
    assert "needs 3 of each" in head["why"]["u_lira"]
    assert rows["retrain-2"]["cka_retrained"] is None and rows["retrain-2"]["seed"] == 2
    document = json.loads((written / "metrics.json").read_text())
    assert document["reference"]["seeds"] == 2
    assert document["reference"]["bands"]["cka_original"]["std"] > 0
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") >= 9
    for name in ("metrics.csv", "metrics.tex", "table.md"):
        assert "head" in (written / name).read_text(encoding="utf-8")
    facts = json.loads((written / "evaluation.json").read_text())
    assert facts["request"]["classes"] == [3, 8] and facts["cka_band"]["pairs"] == 1


def same(first: Any, second: Any, where: str) -> None:
    """Equal but for what another split into batches does to float32 features."""
    if isinstance(first, dict):
        assert set(first) == set(second), where
        for key in first:
            same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for a, b in zip(first, second, strict=True):
            same(a, b, where)
    elif isinstance(first, float) and isinstance(second, float):
        assert math.isclose(first, second, rel_tol=1e-3, abs_tol=5e-3), (where, first, second)
    else:
        assert first == second, where


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["quick", "full"])
def test_two_ranks_give_the_same_rows(
    depth: str,
    original: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    args = ("evaluate", *arguments(original, runs, depth), "--out")
    on_ranks(2, script_on, *args, tmp_path / "two")
    if depth == "quick":
        script_on(Ranks(), *args, tmp_path / "one")
    whole = request.getfixturevalue("written") if depth == "full" else tmp_path / "one"
    one, two = rows_of(whole), rows_of(tmp_path / "two")
    assert len(one) == 5
    for row in one.values():
        for key in ("relearn", "relearn_steps", "relearn_steps_head", "anamnesis_index"):
            row.pop(key, None)
            row["why"].pop(key, None)
    for row in (*one.values(), *two.values()):
        row.pop("embedding", None)  # a picture: t-SNE magnifies rounding
    same(one, two, "rows")


@pytest.mark.slow
def test_the_cache_gives_the_same_rows_without_a_pass(
    written: Path, original: Path, runs: dict[str, Path], scripts: Scripts, tmp_path: Path
) -> None:
    def refused(*args: object) -> None:
        raise AssertionError("a network was run")

    scripts.monkeypatch.setattr("letheon.engine.models.classifier.Classifier.forward", refused)
    # The page's example images are shown to the networks all the same.
    scripts.monkeypatch.setattr(evaluate, "find_examples", lambda *args: {})
    cache = written.parent / "cache"
    ended = scripts(
        "evaluate", *arguments(original, runs)[:-4], "--cache", cache,
        "--depth", "full", "--attacks", 0, "--out", tmp_path / "again",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    first, again = rows_of(written)["head"], rows_of(tmp_path / "again")["head"]
    for key in ("FA", "knn", "idi", "js", "cka_by_layer", "svc_efficacy_entropy"):
        assert first[key] == again[key]


@pytest.mark.slow
def test_what_is_stored_is_found_by_its_images(written: Path, runs: dict[str, Path]) -> None:
    """For `dispose`: of five models the training images, and the balanced part of them."""
    cache = written.parent / "cache"
    data = json.loads((runs["head"] / "run.json").read_text())["data"]
    assert len(stored_outputs(cache, data["train"])) == 10
    assert stored_outputs(cache, "") == []


def test_a_page_that_fails_leaves_the_tables(
    original: Path, runs: dict[str, Path], scripts: Scripts, tmp_path: Path
) -> None:
    def broken(*args: object) -> None:
        raise LookupError("no such font")

    scripts.monkeypatch.setattr(evaluate, "find_examples", broken)
    words = ["--original", original, "--runs", runs["head"], "--device", "cpu", "--report"]
    with pytest.raises(LookupError, match="no such font"):
        scripts("evaluate", *words, "--out", tmp_path / "table")
    assert rows_of(tmp_path / "table").keys() == {"original", "head"}
    scripts.monkeypatch.undo()
    assert scripts("evaluate", *words, "--out", tmp_path / "table").code == 2  # not "already done"
    assert scripts("evaluate", *words, "--out", tmp_path / "table", "--overwrite").code == 0
    assert (tmp_path / "table" / "report.html").is_file()


def test_a_stopped_evaluation_goes_on_from_finished_rows(
    original: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = evaluate.Settings(
        original=original, retrained=(runs["retrain-2"],), runs=(runs["retrain-3"], runs["head"]),
        out=tmp_path / "table",
    )  # fmt: skip
    finish, measured = Measuring._finish, list[str]()

    def stop(self: Measuring, entry: Any, *of: Any) -> Any:
        if entry.name == "head" and "head" not in measured:
            measured.append("head")
            raise KeyboardInterrupt
        measured.append(entry.name)
        return finish(self, entry, *of)

    monkeypatch.setattr(Measuring, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(settings, Ranks())
    assert not settings.out.exists() and measured.pop() == "head"
    kept = sorted((tmp_path / "table.rows").iterdir())
    assert measured == ["original", "retrain-2", "retrain-3"] and len(kept) == 3
    flipped = bytearray(kept[0].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    kept[0].write_bytes(bytes(flipped))  # is not trusted: that row is measured again
    measured[:] = ["head"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun starts it again
    evaluate.main(settings, Ranks())
    assert len(measured) == 3 and measured[-1] == "head"
    assert not (tmp_path / "table.rows").exists()
    monkeypatch.undo()
    whole = replace(settings, out=tmp_path / "whole")
    evaluate.main(whole, Ranks())
    assert rows_of(tmp_path / "table") == rows_of(tmp_path / "whole")
    for name in ("table.md", "metrics.csv"):
        assert (tmp_path / "table" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_stopped_relearning_goes_on_from_the_models_that_are_done(
    original: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = evaluate.Settings(
        original=original, runs=(runs["head"],), out=tmp_path / "table", extent=Extent(relearn=1),
        device="cpu",
    )  # fmt: skip
    curves, calls = session.curves, list[str]()

    def stop(*of: Any) -> Any:
        calls.append("stop" if calls == ["curves"] else "curves")
        if calls[-1] == "stop":
            raise KeyboardInterrupt
        return curves(*of)

    monkeypatch.setattr(session, "curves", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(settings, Ranks())
    evaluate.main(settings, Ranks())
    assert calls == ["curves", "stop", "curves"]  # then of the second model alone
    assert not (tmp_path / "table.rows").exists()
    monkeypatch.undo()
    evaluate.main(replace(settings, out=tmp_path / "whole"), Ranks())
    assert rows_of(tmp_path / "table") == rows_of(tmp_path / "whole")


def test_results_come_back_as_they_were_stored(tmp_path: Path) -> None:
    rows = FinishedRows(tmp_path, Ranks())
    curve = RelearnCurve([0, 1], [0.1 + 0.2, 1 / 3], None)
    refusal = NotMeasurable("got no original")
    results: dict[str, Result] = {
        "attack": Attack({"prompt": 0.1 + 0.2, "barrier": refusal, "retain only": 0.0}),
        "curves": {"whole network": curve, "head only": curve._replace(reached=1)},
        "text": "got a loss that is not finite",
    }
    store = ResultStore(rows, {name: {"weights": name} for name in results})
    for name, result in results.items():
        store.save(name, result)
    found = store.load()
    assert list(found) == list(results)
    attack = found.pop("attack")
    assert isinstance(attack, Attack) and list(attack.results) == [
        "prompt",
        "barrier",
        "retain only",
    ]
    assert attack.result("prompt") == 0.1 + 0.2
    with pytest.raises(NotMeasurable, match="got no original"):
        attack.result("barrier")
    assert found == {name: results[name] for name in found}


@pytest.mark.slow
def test_related_data_and_the_critic_of_later_layers(
    original: Path, runs: dict[str, Path], scripts: Scripts, tmp_path: Path
) -> None:
    args = (
        "--original", original, "--retrained", runs["retrain-2"], "--runs", runs["head"],
        "--out", tmp_path / "out", "--relearn", "10",
    )  # fmt: skip
    ended = scripts(
        "evaluate", *args, "--depth", "full", "--critic", "layers", "--related", "class:5,9"
    )
    assert ended.code == 0, ended.err
    rows = rows_of(tmp_path / "out")
    assert rows["head"]["idi"] == pytest.approx(1, abs=1e-6)
    assert rows["head"]["audit"]["critic"] == "layers"
    bits = rows["original"]["information_by_layer"]
    assert all(0 <= value <= math.log(2) for value in bits.values()) and bits["net.conv1"] > 0.2
    assert bits == pytest.approx(rows["head"]["information_by_layer"], abs=1e-6)
    curve = rows["head"]["relearn"]["related data"]
    assert curve["steps"] == list(range(11)) and max(curve["accuracy"]) < 0.9
    ended = scripts("evaluate", *args, "--overwrite", "--related", "class:3")
    assert ended.code == 2 and "was to be forgotten" in ended.err
    ended = scripts("evaluate", *args[:-2], "--overwrite", "--related", "class:5")
    assert ended.code == 2 and "add relearn" in ended.err
    # A folder: its classes go by their names.
    for name in ("3", "stranger"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((16, 16, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    ended = scripts("evaluate", *args, "--overwrite", "--related", tmp_path / "photos")
    assert ended.code == 0, ended.err
    assert "related data" in rows_of(tmp_path / "out")["head"]["relearn"]
    (tmp_path / "photos" / "3").rename(tmp_path / "photos" / "unknown")
    ended = scripts("evaluate", *args, "--overwrite", "--related", tmp_path / "photos")
    assert ended.code == 2 and "none of the models'" in ended.err


def test_files_need_a_folder_and_names_must_differ(
    original: Path, runs: dict[str, Path], scripts: Scripts
) -> None:
    ended = scripts("evaluate", "--original", original, "--forget", "class:3", "--depth", "full")
    assert ended.code == 2 and "name one" in ended.err
    ended = scripts("evaluate", "--original", original, "--runs", runs["head"], runs["head"])
    assert ended.code == 2 and "several models named" in ended.err


def test_a_model_that_diverged_is_refused_by_name(
    original: Path, scripts: Scripts, tmp_path: Path
) -> None:
    model = load_model(original)
    with torch.no_grad():
        model.net.get_parameter("conv3.weight").mul_(1e38)
    save_model(tmp_path / "huge.safetensors", model)
    args = ("--forget", "class:3", "--depth", "full", "--out", tmp_path / "out")
    ended = scripts("evaluate", "--original", tmp_path / "huge.safetensors", *args)
    assert ended.code == 2 and re.search(r"layer net\.conv[34] of huge", ended.err), ended.err
    quick = ("--forget", "class:3", "--original", tmp_path / "huge.safetensors")
    ended = scripts("evaluate", *quick)
    assert ended.code == 2 and "pooled features of huge" in ended.err, ended.err
    weights = load_file(original / "weights.safetensors")
    weights["conv2.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "broken.safetensors")
    named = ("--model", "small", *args)
    ended = scripts("evaluate", "--original", tmp_path / "broken.safetensors", *named)
    assert ended.code == 2 and "conv2.weight" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_models_that_cannot_be_measured_leave_the_others_their_rows(
    original: Path, runs: dict[str, Path], scripts: Scripts, tmp_path: Path
) -> None:
    model = load_model(original)
    with torch.no_grad():
        model.net.get_parameter("conv3.weight").mul_(1e38)
    save_model(tmp_path / "huge.safetensors", model)
    shutil.copytree(runs["head"], tmp_path / "broken")
    weights = load_file(original / "weights.safetensors")
    weights["conv2.weight"][0, 0] = float("nan")
    model.net.load_state_dict(weights)
    save_model(tmp_path / "broken", model)
    Record(tmp_path / "failed", Ranks(), {}).fail(RunFailed("got a loss of nan at step 7"))
    ended = scripts(
        "evaluate", "--original", original, "--runs", tmp_path / "huge.safetensors",
        tmp_path / "broken", tmp_path / "failed", runs["head"], "--out", tmp_path / "out",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert list(rows_of(tmp_path / "out")) == ["original", "head"]
    left_out = json.loads((tmp_path / "out" / "metrics.json").read_text())["left_out"]
    assert list(left_out) == ["broken", "failed", "huge"]
    assert "conv2.weight" in left_out["broken"] and "nan at step 7" in left_out["failed"]
    assert "pooled features of huge" in left_out["huge"]
    assert "left out: huge" in ended.out
    ended = scripts("evaluate", "--runs", tmp_path / "failed", "--forget", "class:3")
    assert ended.code == 2 and "nan at step 7" in ended.err


def test_a_run_of_the_first_edition_is_a_control(
    original: Path, scripts: Scripts, tmp_path: Path
) -> None:
    old = ROOT / "tests" / "fixtures" / "run-of-first-edition"
    ended = scripts("evaluate", "--original", original, "--runs", old, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    row = rows_of(tmp_path / "out")["run-of-first-edition"]
    assert row["role"] == "control" and row["forgotten"] == [3, 8]
    assert row["seconds"] == pytest.approx(0.24, abs=0.01) and row["FA"] < row["RA"]
