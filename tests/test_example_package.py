"""A method of another package: installed, with its own option and state, stopped and resumed.

One that is broken, no method, or named as one of ours is left out and named.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch_tools import ROOT

CODE = """
import sys
from pathlib import Path
from letheon.engine.runs import plan
from letheon.engine.runs.stop import Poll, Stopped
from letheon.launch import forget

weights, out = sys.argv[1:]

class Breaks(Poll):
    steps = 0
    def after_step(self, *broken):
        self.steps += 1
        if self.steps > 5:
            raise Stopped("on purpose")
        return super().after_step(*broken)

def call(name, *words):
    sys.argv = ["forget", "--weights", weights, "--forget", "class:3", "--device", "cpu",
                "--out", f"{out}/{name}", *words]
    try:
        forget.start()
    except SystemExit as end:
        return end.code or 0
    return 0

method = ["fading", "--epochs", "2", "--fade", "0.05", "--save-every", "2steps"]
assert call("whole", *method) == 0
usual, plan.Poll = plan.Poll, Breaks
assert call("parts", *method) == 75
assert list(Path(out, "parts", "state").iterdir())
plan.Poll = usual
assert call("parts", *method) == 0
assert call("inner", "salun", "--density", "0.25", "fading", "--fade", "0.02") == 0
assert call("help", "fading", "--help") == 0
"""


def announce(site: Path, package: str, method: str) -> None:
    """Let a package be installed that announces a method, as an entry point says it."""
    info = site / f"{package}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[letheon.methods]\n{method}\n")


@pytest.mark.slow
def test_an_installed_method_is_one_like_ours(original: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools, which installs the example, is missing")
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "tests" / "example_package", source)
    site.mkdir()
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(site), "egg_info",
         "--egg-base", str(site)],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    announce(site, "shadow", "salun = fading:Fading")
    announce(site, "wrong", "wrong = fading:_loss")
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(original), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "--fade" in ended.stdout and "Share of the way to the running mean" in ended.stdout
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "parts")]
    assert runs[0]["weights"] == runs[1]["weights"] and runs[0]["method"] == "fading"
    assert "goes on with the unfinished run" in ended.stderr
    settings = json.loads((tmp_path / "inner" / "settings.json").read_text())["method"]
    assert settings["density"] == 0.25 and settings["inner"]["fade"] == 0.02
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("warning: left out")]
    packages = {"broken": "letheon-example", "salun": "shadow", "wrong": "wrong"}
    assert len(warnings) == len(packages)
    for name, package in packages.items():
        assert any(f"'{name}' of {package}" in line for line in warnings), name
    assert "fading_that_is_not_there" in ended.stderr and "Traceback" not in ended.stderr
