"""Whole jobs on a GPU, as a user starts them, beside the same jobs on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launch_tools import Scripts, torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = {
    "retrain": ("--epochs", 2, "--lr", 0.05),
    "finetune": ("--epochs", 2, "--lr", 0.05),
    "grad-ascent": ("--epochs", 1, "--lr", 1e-4),
    "l1-sparse": ("--epochs", 2, "--lr", 0.05),
    "spkd": ("--epochs", 2, "--lr", 2.5e-3),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """original, mask, and a run of several methods, all made on the GPU with the defaults."""
    folder = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        run = _Runner(patch)
        run("train", "--out", folder / "original", "--epochs", 8, "--lr", 0.05)
        forget = ("--weights", folder / "original", "--forget", "class:3,8")
        run("mask", *forget, "--out", folder / "mask.safetensors")
        for name, options in METHODS.items():
            run("forget", *forget, "--out", folder / name, name, *options)
        run(
            "forget", *forget, "--out", folder / "salun", "salun",
            "--mask", folder / "mask.safetensors", "random-label", "--epochs", 2,
            "--lr", 0.03,
        )  # fmt: skip
    return folder


class _Runner:
    """`Scripts` that insists on success, without a test's capture of the output."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.scripts = Scripts(patch, _NoCapture())  # type: ignore[arg-type]

    def __call__(self, script: str, *args: object) -> None:
        ended = self.scripts(script, *args)
        assert ended.code == 0, (script, args)


class _NoCapture:
    def readouterr(self) -> tuple[str, str]:
        return "", ""


def table(scripts: Scripts, jobs: Path, out: Path, *options: object) -> dict[str, dict[str, Any]]:
    """The rows of the evaluation of everything, by name."""
    ended = scripts("evaluate", jobs, "--out", out, "--json", *options)
    assert ended.code == 0, ended.err
    return {row["name"]: row for row in json.loads(ended.out)["facts"]["rows"]}


def test_the_default_is_the_gpu_in_bf16(jobs: Path) -> None:
    for name in ("original", *METHODS, "salun"):
        assert torch.cuda.get_device_name(0) in (jobs / name / "versions.json").read_text()
        assert '"dtype": "bf16"' in (jobs / name / "run.json").read_text()
        weights = load_file(jobs / name / "weights.safetensors")
        assert all(value.isfinite().all() for value in weights.values())


def test_evaluation_is_that_of_the_cpu(jobs: Path, scripts: Scripts, tmp_path: Path) -> None:
    """All numbers of all rows in float32: shares to a sample or two, the others to 2 %."""
    rows = []
    for place, device in enumerate(("cuda", "cpu")):
        options = ("--device", device, "--dtype", "fp32", "--downstream", "digits-varied")
        rows.append(table(scripts, jobs, tmp_path / str(place), *options))
    assert rows[0].keys() == rows[1].keys()
    far = {
        f"{name} {metric}": (rows[0][name][metric], value)
        for name, row in rows[1].items()
        for metric, value in row.items()
        if isinstance(value, float)
        and metric != "seconds"
        and abs(rows[0][name][metric] - value) > 0.01 + 0.02 * abs(value)
    }
    assert not far


def test_the_full_depth_runs(jobs: Path, scripts: Scripts, tmp_path: Path) -> None:
    rows = table(scripts, jobs, tmp_path / "full", "--depth", "full", "--relearn", 5)
    assert {"original", "retrain", "salun"} <= rows.keys()


@pytest.mark.parametrize("loader", ["beton", "resident"])
def test_loaders_on_the_gpu_train_alike(loader: str, scripts: Scripts, tmp_path: Path) -> None:
    """One seed, one order: the loss of an epoch is that of the plain loader."""
    losses = []
    for kind in ("torch", loader):
        out = tmp_path / kind
        ended = scripts("train", "--out", out, "--epochs", 1, "--loader", kind, "--dtype", "fp32")
        assert ended.code == 0, ended.err
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"phase"' in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("compile_mode", ["default", "max"])
def test_a_compiled_job(compile_mode: str, jobs: Path, scripts: Scripts, tmp_path: Path) -> None:
    ended = scripts(
        "forget", "--weights", jobs / "original", "--forget", "class:3", "--out", tmp_path / "run",
        "--compile", compile_mode, "spkd", "--epochs", 2, "--lr", 2.5e-3,
    )  # fmt: skip
    assert ended.code == 0, ended.err


def test_torchrun_over_nccl(jobs: Path, tmp_path: Path) -> None:
    """One rank a GPU: the process group of NCCL is made, used and left."""
    gpus = torch.cuda.device_count()
    ended = torchrun(
        gpus, "forget", "--weights", jobs / "original", "--forget", "class:3,8", "--out",
        tmp_path / "run", "finetune", "--epochs", 1,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    ended = torchrun(
        gpus, "evaluate", "--original", jobs / "original", "--runs", tmp_path / "run", "--out",
        tmp_path / "table",
    )  # fmt: skip
    assert ended.code == 0, ended.err


def test_more_ranks_than_gpus_are_refused_in_a_line(jobs: Path, tmp_path: Path) -> None:
    ended = torchrun(
        torch.cuda.device_count() + 1, "forget", "--weights", jobs / "original", "--forget",
        "class:3", "--out", tmp_path / "run", "finetune",
    )  # fmt: skip
    assert ended.code != 0 and "start fewer processes on it" in ended.err


def test_doctor_and_the_estimate(scripts: Scripts) -> None:
    for options in ((), ("--estimate", "--data", "digits", "--model", "small", "--batch-size", 64)):
        ended = scripts("doctor", *options)
        assert ended.code == 0, ended.out + ended.err
        assert torch.cuda.get_device_name(0) in ended.out


def test_export_of_a_model_trained_on_the_gpu(jobs: Path, scripts: Scripts, tmp_path: Path) -> None:
    ended = scripts("export", jobs / "salun", "--out", tmp_path / "m.safetensors")
    assert ended.code == 0, ended.err
