"""Damaged and hostile files end in a result or in one line; never elsewhere, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch_tools import ROOT


def fuzz(count: int, seed: int, folder: Path) -> list[str]:
    """What went wrong in `count` inputs of each parser, read in a process with little memory."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz.parsers", str(count), str(seed),
         str(folder)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    problems = map(json.loads, ended.stdout.splitlines())
    return ["{parser} {number} {victims}\n{problem}".format(**one) for one in problems]


def test_no_parser_ends_in_a_traceback(tmp_path: Path) -> None:
    assert not fuzz(12, 7, tmp_path)


@pytest.mark.slow
def test_hundreds_of_inputs_a_parser(tmp_path: Path) -> None:
    assert not fuzz(500, 12, tmp_path)  # the drill has others, and ten thousand of them
