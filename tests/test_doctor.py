"""The doctor: one line a check, failures with exit code 3, ranks that differ named by host."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image

from letheon.engine.distributed import Ranks
from letheon.errors import RunFailed
from letheon.launch import doctor
from letheon.launch.doctor import GIB, Finding
from tests.launch_tools import Scripts
from tests.pool import on_ranks


def test_a_healthy_machine_has_no_failure(scripts: Scripts, tmp_path: Path) -> None:
    ended = scripts("doctor", "--data", "digits", "--out", tmp_path / "not" / "yet", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    checks = {row["check"]: row for row in report["checks"]}
    assert report["world"] == 1
    assert "1438 images of 10 classes" in checks["data train"]["text"]
    assert checks["disk"]["status"] in ("ok", "warning")
    assert not (tmp_path / "not").exists()


def test_an_unreadable_image_is_a_failure_that_names_it(
    scripts: Scripts,
    tmp_path: Path,
) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.png")
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"no image")
    ended = scripts("doctor", "--data", tmp_path, "--out", tmp_path)
    assert ended.code == 3
    line = next(line for line in ended.out.splitlines() if line.startswith("failure"))
    assert "reading train: 1 of 3 cannot be read" in line and "1.png" in line
    assert "ok       reading test" in ended.out


def test_a_set_that_is_not_there_is_a_failure(scripts: Scripts, tmp_path: Path) -> None:
    ended = scripts("doctor", "--data", tmp_path / "nowhere", "--out", tmp_path)
    assert ended.code == 3 and "failure  data: got" in ended.out
    assert "which does not exist" in ended.out


def other_data(ranks: Ranks) -> str:
    """Rank 1 opens another set."""
    settings = doctor.Settings(data="digits" if ranks.rank == 0 else "nowhere")
    own = [Finding("data", "ok", f"digest {settings.data}"), Finding("code", "ok", "same")]
    own.append(Finding("memory", "ok", f"{ranks.rank} GiB", differs=True))
    merged = list(doctor._merge([("n1 (rank 0)", own), ("n2 (rank 1)", own[:0])]))
    assert [place for place, _ in merged] == ["n1 (rank 0)"] * 3
    try:
        doctor.main(settings, ranks)
    except RunFailed:
        return "failed"
    return "passed"


def other_device(ranks: Ranks) -> str:
    """Rank 1 sees a GPU."""
    card = SimpleNamespace(name="a GPU", total_memory=GIB, major=9, minor=0, uuid="x")
    with (
        mock.patch("torch.cuda.get_device_properties", return_value=card),
        mock.patch("torch.cuda.nccl.version", return_value=(2, 30)),
        mock.patch.object(doctor, "_print") as show,
    ):
        gpu = torch.device("cuda", 0)
        try:
            doctor.main(doctor.Settings(), replace(ranks, device=gpu) if ranks.rank else ranks)
        except RunFailed:
            if not ranks.main:
                return "failed"
            (merged, _), _ = show.call_args
            text = [f.text for _, f in merged if f.check == "kind of device"]
            return f"failed: {text} {'all-reduce' in [f.check for _, f in merged]}"
    return "passed"


def both(ranks: Ranks) -> list[str]:
    return [other_data(ranks), other_device(ranks)]


def test_every_rank_ends_with_the_failure_of_one() -> None:
    first, second = on_ranks(2, both)
    assert first == ["failed", "failed: ['ranks compute on cpu and cuda'] False"]
    assert second == ["failed", "failed"]


@pytest.mark.parametrize(
    ("texts", "differs", "status", "places"),
    [
        (["a", "a"], False, "ok", [""]),
        (["a", "b"], False, "failure", ["n1", "n2"]),
        (["a", "b"], True, "ok", ["n1"]),
    ],
)
def test_what_differs_between_ranks_is_told_with_its_place(
    texts: list[str], differs: bool, status: str, places: list[str]
) -> None:
    reports = [
        (place, [Finding("x", "ok", text, differs=differs)])
        for place, text in zip(("n1", "n2"), texts, strict=True)
    ]
    merged = list(doctor._merge(reports))
    assert [place for place, _ in merged] == places
    assert {finding.status for _, finding in merged} == {status}
