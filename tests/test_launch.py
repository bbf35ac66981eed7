"""The scripts from end to end: one process, two ranks, every kind of request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

from letheon.engine.checkpoints.model_file import load_model
from letheon.eval.metrics.knn_splits import split
from letheon.loaders.datasets.digits import downstream, upstream
from tests.launch_tools import Scripts, script_on
from tests.pool import on_ranks
from tests.test_bad_input import images as pictures


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_table_is_what_the_models_do(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    forget = ("--weights", original, "--forget", "class:3")
    short = ("--epochs", "2", "--lr", "0.05")
    ended = scripts("forget", *forget, "--out", tmp_path / "retrain", "retrain", *short)
    assert ended.code == 0 and f"--retrained {tmp_path / 'retrain'} --out" in ended.out
    assert scripts("forget", *forget, "--out", tmp_path / "rl", "random-label", *short).code == 0
    ended = scripts(
        "evaluate", "--original", original, "--retrained", tmp_path / "retrain",
        "--runs", tmp_path / "rl", "--downstream", "digits", "--out", tmp_path / "table",
    )  # fmt: skip
    assert ended.code == 0
    rows = {r["name"]: r for r in json.loads((tmp_path / "table/metrics.json").read_text())["rows"]}
    assert list(rows) == ["original", "retrain", "rl"]
    assert rows["retrain"]["FA"] == 0 and rows["retrain"]["gap"] == 0
    assert abs(rows["original"]["cka_original"] - 1) < 1e-9
    assert rows["original"]["FA"] > 0.8 and rows["original"]["RA"] > 0.8
    for name in rows:
        assert name in ended.out
    # The k-NN column again, by scikit-learn on features computed here.
    model = load_model(tmp_path / "rl")
    shares = []
    for images in downstream().values():
        pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            features = model((pixels - 0.5) / 0.5).features.numpy()
        parts = split(len(images))
        knn = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
        knn.fit(features[parts.database], images.labels[parts.database])
        shares.append(knn.score(features[parts.queries], images.labels[parts.queries]))
    assert abs(np.mean(shares) - rows["rl"]["knn"]) < 2e-3  # near ties may fall either way


def test_two_ranks_give_the_same_run(original: Path, scripts: Scripts, tmp_path: Path) -> None:
    args = ("--weights", original, "--forget", "class:3,8")
    method = ("spkd", "--epochs", "2", "--lr", "1e-4", "--batch-norm", "frozen")
    assert scripts("forget", *args, "--out", tmp_path / "one", *method).code == 0
    on_ranks(2, script_on, "forget", *args, "--out", tmp_path / "two", *method)
    one, two = (load_file(tmp_path / run / "weights.safetensors") for run in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3, msg=key)
    phases = ([x for x in lines(tmp_path / run) if x["kind"] == "phase"] for run in ("one", "two"))
    for a, b in zip(*phases, strict=True):
        assert (a["forget_read"], a["retain_read"]) == (b["forget_read"], b["retain_read"])
        assert abs(float(str(a["loss"])) - float(str(b["loss"]))) < 1e-3
    on_ranks(
        2, script_on, "evaluate", "--original", original, "--runs", tmp_path / "one",
        tmp_path / "two", "--out", tmp_path / "table",
    )  # fmt: skip
    _, a, b = json.loads((tmp_path / "table/metrics.json").read_text())["rows"]
    assert a["counts"] == b["counts"]


def test_the_run_folder_tells_all(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = scripts(
        "forget", "--weights", original, "--forget", "class:8,3,8", "--out", run,
        "salun", "--density", "0.2", "random-label", "--epochs", "1",
    )  # fmt: skip
    assert ended.code == 0
    request = json.loads((run / "request.json").read_text())
    assert request["classes"] == [3, 8] and request["notes"] == ["id 8 stood twice; counted once"]
    settings = json.loads((run / "settings.json").read_text())
    assert settings["method"]["density"] == 0.2 and settings["forget"] == "class:8,3,8"
    versions = json.loads((run / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.partition("+")[0]
    facts = json.loads((run / "run.json").read_text())
    assert (
        facts["method"] == "salun"
        and facts["kind"] == "unlearning"
        and facts["seconds"]["train"] > 0
    )
    [phase] = [line for line in lines(run) if line["kind"] == "phase"]
    labels = upstream()[0].labels
    assert phase["forget_read"] == int(np.isin(labels, (3, 8)).sum())
    assert phase["retain_read"] == int((~np.isin(labels, (3, 8))).sum())


@pytest.mark.slow
def test_every_kind_of_request(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("3\n8\n3\n")
    (tmp_path / "samples.txt").write_text("5\n17\n1000\n")
    asked = {
        "file": ["--forget", f"file:{tmp_path}/classes.txt"],
        "random": ["--forget", "random:2"],
        "samples": ["--forget", f"samples:{tmp_path}/samples.txt"],
        "top": ["--forget", "top:2", "--downstream", "digits"],
    }
    found = {}
    for name, args in asked.items():
        ended = scripts(
            "forget", "--weights", original, *args, "--out", tmp_path / name,
            "finetune", "--epochs", "1",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        found[name] = json.loads((tmp_path / name / "request.json").read_text())
        if name in ("random", "top"):  # which classes it came to stands in the last lines
            assert f"{args[1]} ({', '.join(map(str, found[name]['classes']))})" in ended.out
    assert found["file"]["classes"] == [3, 8]
    assert len(found["random"]["classes"]) == 2 and len(found["top"]["classes"]) == 2
    assert found["samples"]["samples"] == [5, 17, 1000]
    ended = scripts("evaluate", "--original", original, "--runs", tmp_path / "samples")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("form", ["beton", "arrays --size 16", "list"])
def test_prepare_names_what_is_unreadable(form: str, scripts: Scripts, tmp_path: Path) -> None:
    source = pictures(tmp_path / "source", each=3)
    (source / "train" / "4" / "1.png").write_bytes(b"")
    args = f"--source {source} --out {tmp_path}/out --workers 0 --form {form}"
    ended = scripts("prepare", *args.split())
    assert ended.code == 0, ended.err
    assert "29 images of train" in ended.out and "(1 unreadable left out" in ended.out
    lists = [p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix in (".csv", ".json")]
    assert any("4/1.png" in text for text in lists)
    ended = scripts(
        "train", "--data", tmp_path / "out", "--out", tmp_path / "run", "--epochs", "1",
        "--batch-size", "8",
    )  # fmt: skip
    assert ended.code == 0, ended.err


def test_define_prints_the_metrics(scripts: Scripts) -> None:
    ended = scripts("evaluate", "--define")
    assert ended.code == 0 and "TRA: " in ended.out and "k = 5" in ended.out


def test_a_collapsed_network_is_a_warning_in_the_record(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    args = ("--weights", original, "--forget", "class:3,8", "--out", tmp_path / "x")
    ended = scripts("forget", *args, "finetune", "--epochs", 1, "--lr", 5, "--momentum", 0)
    assert ended.code == 0, ended.err
    [warning] = json.loads((tmp_path / "x" / "run.json").read_text())["warnings"]
    assert "the network collapsed" in warning and warning in ended.err
    assert (tmp_path / "x" / "weights.safetensors").exists()
