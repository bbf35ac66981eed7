"""The GPU suite: refuses in one line without a GPU, passes all of its checks with one."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SUITE), *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(tmp_path):
    result = run("--out", str(tmp_path / "gpu.csv"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert "got no CUDA device, expected one" in result.stderr
    assert len([line for line in result.stderr.splitlines() if "gpu_suite" in line]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_checks_pass(tmp_path):
    result = run("--only", "checks", "--out", str(tmp_path / "gpu.csv"))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("section", ["checks", "ladder", "methods"])
def test_a_rehearsal_without_a_gpu_writes_every_row(tmp_path, section):
    out = tmp_path / "rehearsal.csv"
    result = run("--device", "cpu", "--repeats", "1", "--only", section, "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "FAILED" not in result.stderr
    rows = list(csv.DictReader(out.open()))
    metrics = {row["metric"] for row in rows}
    wanted = {
        "checks": {"difference"},
        "ladder": {"time", "rate", "share of a bf16 product's rate", "compile"},
        "methods": {"time", "more than the plain step", "share of what its operations allow"},
    }
    assert wanted[section] <= metrics
    assert all(float(row["median"]) == float(row["median"]) for row in rows)
