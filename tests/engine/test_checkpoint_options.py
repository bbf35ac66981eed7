"""A checkpoint from elsewhere at the scripts: what is assumed is told, and the options say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.launch_tools import Scripts


def row(out: Path) -> dict[str, Any]:
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    first: dict[str, Any] = metrics["rows"][0] if isinstance(metrics, dict) else metrics[0]
    return first


def test_a_networks_images_are_told_and_can_be_said(
    original: Path, scripts: Scripts, tmp_path: Path
) -> None:
    state = load_file(original / "weights.safetensors")
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(state, hub / "model.safetensors")
    common = ["--data", "digits", "--forget", "class:3", "--device", "cpu"]
    ended = scripts("evaluate", "--original", original, *common, "--out", tmp_path / "ours")
    assert ended.code == 0 and "assumed" not in ended.err
    for name, path in (("theirs", tmp_path / "theirs.pth"), ("hub", hub)):
        ended = scripts(
            "evaluate", "--original", path, *common, "--out", tmp_path / f"{name}-table"
        )
        assert ended.code == 0
        assert f"{path}: small of 10 classes by its keys" in ended.err
        assert "assumed: size 16, resize none" in ended.err
        assert row(tmp_path / f"{name}-table")["RA"] == row(tmp_path / "ours")["RA"]
    wrong = ["--size", 8, "--mean", 0.1, 0.1, 0.1, "--resize", "square"]
    ended = scripts(
        "evaluate", "--original", tmp_path / "theirs.pth", *common, *wrong, "--out", tmp_path / "8"
    )
    assert ended.code == 0
    assert "assumed: resize_to 8, interpolation bilinear, std 0.5 0.5 0.5" in ended.err
    assert row(tmp_path / "8")["RA"] < row(tmp_path / "ours")["RA"] - 0.1


def test_a_run_folder_says_its_own_images(original: Path, scripts: Scripts, tmp_path: Path) -> None:
    ended = scripts(
        "forget", "--weights", original, "--size", 8, "--forget", "class:3", "--out",
        tmp_path / "out", "head-distillation",
    )  # fmt: skip
    assert ended.code == 2
    assert ended.err.startswith("error: --size: got size for ")
    assert not (tmp_path / "out").exists()
