"""The notebooks and examples of the docs run from top to bottom, and hold no outputs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launch_tools import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
NEEDS = {"lightning_module": "lightning"}


def code_of(notebook: Path) -> list[str]:
    """The code cells of a notebook, in order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(script: Path, folder: Path) -> str:
    """What a script prints, run in a folder of its own."""
    env = {**os.environ, "MPLBACKEND": "agg"}
    ended = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert len(code_of(notebook)) > 3 and content["cells"][0]["source"][0].startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    """Its code cells in order, in one process; what they claim is checked by what they print."""
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(code_of(notebook)), encoding="utf-8")
    lines = run(script, tmp_path).splitlines()
    rows = {line.split()[0].rstrip(":"): line.split()[1:] for line in lines if line.strip()}
    if notebook.stem == "audit-a-checkpoint":
        assert float(rows["retrained"][-2]) < 50 < 90 < float(rows["unlearned"][-2])
        assert "unlearned  CKA to the original 1.000" in lines
    else:
        assert float(rows["original"][0]) > 90 and float(rows["random-label"][0]) < 10


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    if example.stem in NEEDS and find_spec(NEEDS[example.stem]) is None:
        pytest.skip(f"needs {NEEDS[example.stem]}")
    check_example(example, tmp_path)


def check_example(example: Path, folder: Path) -> None:
    before, after = run(example, folder).splitlines()[-2:]
    assert before == "before: class 2 1.00, the others 1.00"
    assert after == "after: class 2 0.00, the others 1.00"


@pytest.mark.slow
def test_the_method_in_twenty_lines_runs(tmp_path: Path) -> None:
    """The code of docs/extend.md, and what it should come to."""
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    test = "[row] = letheon.evaluate(unlearned=result, train='digits', forget=[3, 8])"
    script = tmp_path / "extend.py"
    script.write_text("\n".join([blocks[0], test, "print(row['FA'], row['RA'])"]), encoding="utf-8")
    forgotten, retained = map(float, run(script, tmp_path).splitlines()[-1].split())
    assert forgotten < 0.2 and retained > 0.8
