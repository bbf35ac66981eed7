"""The notebooks and examples of the docs run from top to bottom, and hold no outputs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.house import WHEEL
from tests.launch_tools import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
NEEDS = {"lightning_module": "lightning"}


def code_of(notebook: Path) -> list[str]:
    """The code cells of a notebook, in order; a name at the end of one is printed, as it shows."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [_shown("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def _shown(code: str) -> str:
    tree = ast.parse(code)
    last = tree.body[-1]
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Name):
        last.value = ast.Call(ast.Name("print"), [last.value], [])
    return ast.unparse(tree)


def run(script: Path, folder: Path, python: Path | str = sys.executable) -> str:
    """What a script prints, run in a folder of its own."""
    env = {**os.environ, "MPLBACKEND": "agg"}
    ended = subprocess.run(
        [str(python), str(script)], cwd=folder, env=env, capture_output=True, text=True,
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


@pytest.mark.slow
def test_a_notebook_runs_from_the_wheel(tmp_path: Path) -> None:
    """In a new environment that has the wheel and cannot see this checkout.

    torch and what else the wheel needs are lent by path, not downloaded again.
    """
    (tmp_path / "source").mkdir()
    for name in (*WHEEL, "letheon"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, *wheels, str(tmp_path / "source")], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tmp_path / "source")
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean" / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    [site] = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(lent), encoding="utf-8")
    script = tmp_path / "notebook.py"
    where = "import letheon.engine; print(letheon.engine.__file__)"
    [notebook] = [path for path in NOTEBOOKS if path.stem == "own-model-and-data"]
    script.write_text("\n\n".join([where, *code_of(notebook)]), encoding="utf-8")
    place, *lines = run(script, tmp_path, python).splitlines()
    assert Path(place).is_relative_to(site)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert float(rows["original"][0]) > 90 and float(rows["random-label"][0]) < 10
    for name in ("eval/report/page.css", "launch/serving/serve.js", "launch/serving/index.html"):
        assert (site / "letheon" / name).is_file()
