"""The plan of the house: which folder may import which, and what no file may do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"kernels": 0, "loaders": 1, "engine": 2, "methods": 3, "eval": 3, "launch": 4}
SOURCES = sorted(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> list[str]:
    """Every module a file imports, inside functions too; `from a import b` gives a and a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_folders_below_it(path: Path) -> None:
    home = path.relative_to(ROOT).parts[0]
    for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = module.split(".")
        assert parts[0] not in FLOORS, f"{module}: import it as letheon.{module}"
        if parts[0] == "letheon" and len(parts) > 1:
            there = FLOORS.get(parts[1], -1)  # a module of letheon/ is the ground
            assert parts[1] == home or there < FLOORS[home], f"{home} imports {module}"


def test_every_folder_of_the_wheel_is_on_a_floor() -> None:
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    [folders] = [
        ast.literal_eval(node.value)
        for node in ast.walk(setup)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FOLDERS"
    ]
    assert set(folders) == set(FLOORS)


def test_no_drawers_for_odds_and_ends() -> None:
    drawers = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert [path for path in SOURCES if path.name in drawers] == []


def test_files_stay_readable() -> None:
    long = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}
    assert long == {}


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                safe = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg in
                        ("weights_only", "allow_pickle")}  # fmt: skip
                kind = ast.unparse(node.func)
                assert safe.get("weights_only") is True or kind == "np.load", path
                assert not safe.get("allow_pickle"), path
            assert (
                "pickle" not in getattr(node, "module", "")
                if isinstance(node, ast.ImportFrom)
                else True
            )
