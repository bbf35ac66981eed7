"""The folders of the house and their syntax trees, for the tests that read the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "letheon": 0, "kernels": 1, "loaders": 2, "engine": 3, "methods": 4, "eval": 4, "launch": 5,
    "benchmarks": 6, "tests": 7,
}  # fmt: skip
"""A folder imports the folders of lower floors and itself; benchmarks may run the scripts."""
WHEEL = [folder for folder in FLOORS if folder not in ("letheon", "benchmarks", "tests")]
HOUSE = ["letheon", *WHEEL]  # what is installed
CODE = [*HOUSE, "benchmarks"]

Function = ast.FunctionDef | ast.AsyncFunctionDef
in_every_folder = pytest.mark.parametrize("folder", list(FLOORS))
in_the_house = pytest.mark.parametrize("folder", HOUSE)
in_the_code = pytest.mark.parametrize("folder", CODE)


@cache
def sources(folder: str) -> tuple[Path, ...]:
    """The Python files of a folder."""
    return tuple(sorted((ROOT / folder).rglob("*.py")))


@cache
def parse(path: Path) -> ast.Module:
    """A file's syntax tree; every node knows its parent."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    return tree


@cache
def walk(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file."""
    return tuple(ast.walk(parse(path)))


def parents(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes around a node, from the inside."""
    while (node := getattr(node, "parent", None)) is not None:  # type: ignore[assignment]
        yield node


def nodes(folder: str) -> Iterator[tuple[Path, ast.AST]]:
    """Every node of every file of a folder."""
    for path in sources(folder):
        for node in walk(path):
            yield path, node


def place(path: Path, node: ast.AST) -> str:
    """file:line of a node."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def check(problems: list[str]) -> None:
    """Fail with one problem a line."""
    assert not problems, "\n" + "\n".join(problems)


def parameters(function: Function) -> list[ast.arg]:
    """The parameters of a function, self and cls aside."""
    spec = function.args
    found = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    return [one for one in found if one is not None and one.arg not in ("self", "cls")]


def decorators(node: Function | ast.ClassDef) -> list[str]:
    """The names of the decorators, without their arguments."""
    return [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
