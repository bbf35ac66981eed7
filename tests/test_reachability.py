"""No code that nothing reaches: functions, classes, methods, and parameters that no caller gives.

Computed by name over the syntax trees, so a name used twice hides the unused one of the two; tests
do not count as use. `pytest tests/test_reachability.py -k loaders` shows what one folder owes.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.house import (
    CODE,
    HOUSE,
    ROOT,
    Function,
    check,
    decorators,
    in_the_house,
    nodes,
    parents,
    parse,
    place,
)  # fmt: skip

PROTOCOLS = {  # names that torch, Python or a notebook call
    "forward", "backward", "setup_context", "step", "is_leaf_module", "_conv_forward", "run",
    "find_class", "persistent_load", "_repr_html_",
    "handle_starttag", "handle_data", "log_message", "handle_error",
    "generate_code", "declare_state_and_memory", "emit",
}  # fmt: skip
PLAIN_DECORATORS = re.compile(
    r"property|cached_property|staticmethod|classmethod|dataclass|contextmanager|cache|lru_cache|"
    r"override|overload|abstractmethod|runtime_checkable|no_grad|inference_mode|wraps|setter|"
    r"jit|autotune|heuristics|once_differentiable|custom_fwd|custom_bwd|disable|total_ordering"
)


CONTRACT = {  # what methods, loggers and metrics of other packages call
    "engine/method.py", "engine/state.py", "engine/statistics.py", "engine/runs/loggers.py",
    "eval/metrics/registry.py",
}  # fmt: skip


@dataclass
class Unit:
    """A function, class or method of the house, and the names its own code uses."""

    path: Path
    node: Function | ast.ClassDef
    name: str
    owner: Unit | None = None  # the class of a method
    uses: set[str] = field(default_factory=set)

    @property
    def called_from_outside(self) -> bool:
        """Python, torch or a registry calls it, whoever names it."""
        registered = any(
            not PLAIN_DECORATORS.fullmatch(d.rsplit(".", 1)[-1]) for d in decorators(self.node)
        )
        special = self.name.startswith("__") and self.name.endswith("__")
        contract = str(self.path.relative_to(ROOT)) in CONTRACT and not self.name.startswith("_")
        return (
            contract or registered or special or (self.owner is not None and self.name in PROTOCOLS)
        )


@cache
def public_names() -> frozenset[str]:
    """What `letheon` and the console commands hand out."""
    public: set[str] = set()
    for node in ast.walk(parse(ROOT / "letheon" / "__init__.py")):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            public |= (
                set(re.findall(r"[A-Za-z_]\w*", node.value)) if " " not in node.value else set()
            )
    errors = parse(ROOT / "letheon" / "errors.py")  # the face hands out the module
    public |= {node.name for node in errors.body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            public.add(node.value.rsplit(":", 1)[-1].strip())
    return frozenset(public)


@cache
def aliases(path: Path) -> dict[str, str]:
    """What a file imports under another name, by that name."""
    return {
        alias.asname: alias.name
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }


def called_name(path: Path, function: ast.AST) -> str:
    """The last name of what is called, as it was defined."""
    last = ast.unparse(function).rsplit(".", 1)[-1]
    return aliases(path).get(last, last)


def name_of(path: Path, node: ast.AST) -> list[str]:
    """The names a node uses: a variable, an attribute, a string of getattr or "module:name"."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return [aliases(path).get(node.id, node.id)]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        around = getattr(node, "parent", None)
        if isinstance(around, ast.Call) and ast.unparse(around.func) in ("getattr", "hasattr"):
            return [node.value]
        if re.fullmatch(r"letheon[\w.]*:\w+", node.value):
            return [node.value.rsplit(":", 1)[1]]
        if isinstance(
            around, ast.arg | ast.AnnAssign | ast.Subscript | Function
        ):  # a type in quotes
            return re.findall(r"\w+", node.value) if len(node.value) < 60 else []
    return []


@cache
def units() -> tuple[tuple[Unit, ...], frozenset[str]]:
    """Every unit of the house, and the names used by what runs without being called."""
    found: dict[ast.AST, Unit] = {}
    for folder in HOUSE:
        for path, node in nodes(folder):
            if isinstance(node, Function | ast.ClassDef):
                around = next(parents(node))
                if isinstance(around, ast.Module | ast.If | ast.Try):
                    found[node] = Unit(path, node, node.name)
                elif isinstance(around, ast.ClassDef) and isinstance(node, Function):
                    found[node] = Unit(path, node, node.name, found.get(around))
    roots: set[str] = set(public_names())
    for folder in CODE:
        for path, node in nodes(folder):
            used = name_of(path, node)
            if not used or any(isinstance(p, ast.ImportFrom | ast.Import) for p in parents(node)):
                continue
            home = next((found[p] for p in parents(node) if p in found), None)
            if home is None or folder == "benchmarks":
                roots |= set(used)
            else:
                home.uses |= set(used) - {home.name}
    return tuple(found.values()), frozenset(roots)


@cache
def reached() -> frozenset[int]:
    """The units that scripts, benchmarks, public names, registries or Python reach."""
    everything, roots = units()
    names_used, reached_units = set(roots), set[int]()
    growing = True
    while growing:
        growing = False
        for unit in everything:
            if id(unit) in reached_units:
                continue
            owner_reached = unit.owner is None or id(unit.owner) in reached_units
            public = unit.owner is not None and unit.owner.name in public_names()
            public = public and not unit.name.startswith("_")
            if owner_reached and (unit.name in names_used or unit.called_from_outside or public):
                reached_units.add(id(unit))
                names_used |= unit.uses
                growing = True
    return frozenset(reached_units)


@in_the_house
def test_all_code_is_reached(folder: str) -> None:
    """By name, from the scripts, benchmarks, public names and registries; tests do not count."""
    check(
        [
            f"{place(unit.path, unit.node)}: {unit.name} is reached by no script or public name"
            for unit in units()[0]
            if unit.path.relative_to(ROOT).parts[0] == folder
            and id(unit) not in reached()
            and not (unit.owner is not None and id(unit.owner) not in reached())
        ]
    )


@cache
def calls() -> dict[str, list[ast.Call]]:
    """The calls of the code by the name that is called."""
    found = defaultdict(list)
    for folder in CODE:
        for path, node in nodes(folder):
            if isinstance(node, ast.Call):
                if ast.unparse(node.func).endswith("partial") and node.args:
                    bound = ast.Call(node.args[0], node.args[1:], node.keywords)
                    found[called_name(path, node.args[0])].append(bound)
                found[called_name(path, node.func)].append(node)
                if ast.unparse(node.func) == "super().__init__":
                    home = next(p for p in parents(node) if isinstance(p, ast.ClassDef))
                    for base in home.bases:
                        found[ast.unparse(base).rsplit(".", 1)[-1]].append(node)
    return found


@cache
def passed_as_value() -> frozenset[str]:
    """Functions handed to others, whose callers cannot be seen."""
    found = set()
    for folder in CODE:
        for _, node in nodes(folder):
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                around = getattr(node, "parent", None)
                called = isinstance(around, ast.Call) and around.func is node
                bound = (
                    isinstance(around, ast.Call)
                    and ast.unparse(around.func).endswith("partial")
                    and around.args[:1] == [node]
                )
                annotation = isinstance(around, ast.arg | ast.AnnAssign | ast.Attribute)
                if not (called or bound or annotation):
                    found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return frozenset(found)


def children_without_init(name: str) -> Iterator[str]:
    """The class and the classes below it that are made by its `__init__`."""
    yield name
    for unit in units()[0]:
        if isinstance(unit.node, ast.ClassDef) and name in [
            ast.unparse(base).rsplit(".", 1)[-1] for base in unit.node.bases
        ]:
            own = any(isinstance(n, Function) and n.name == "__init__" for n in unit.node.body)
            if not own:
                yield from children_without_init(unit.name)


def gives(call: ast.Call, position: int | None, parameter: str) -> bool:
    """True where a call may give the parameter, by name, by position or by stars."""
    if any(k.arg in (parameter, None) for k in call.keywords):
        return True
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    return starred or (position is not None and len(call.args) > position)


def unused_parameters(unit: Unit) -> Iterator[ast.arg]:
    """Parameters with a default that no call of the code gives."""
    assert isinstance(unit.node, Function)
    spec = unit.node.args
    positional = [*spec.posonlyargs, *spec.args]
    shift = 1 if positional and positional[0].arg in ("self", "cls") else 0
    optional = [(a, k - shift) for k, a in enumerate(positional)][
        len(positional) - len(spec.defaults) :
    ]
    optional_by_name: list[tuple[ast.arg, int | None]] = [
        (a, None) for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None
    ]
    called = [unit.name]
    if unit.name == "__init__" and unit.owner is not None:
        called = list(children_without_init(unit.owner.name))
    made = [call for name in called for call in calls().get(name, [])]
    for parameter, position in [*optional, *optional_by_name]:
        if not any(gives(call, position, parameter.arg) for call in made):
            yield parameter


@in_the_house
def test_all_parameters_are_given_by_someone(folder: str) -> None:
    """A default that is never departed from is a constant; public functions are the user's."""
    problems = []
    for unit in units()[0]:
        if unit.path.relative_to(ROOT).parts[0] != folder or not isinstance(unit.node, Function):
            continue
        special = unit.name.startswith("__") and unit.name != "__init__"
        registered = unit.called_from_outside and unit.name != "__init__"
        owner = unit.owner.name if unit.owner is not None else ""
        if special or registered or {unit.name, owner} & public_names():
            continue
        if unit.name in passed_as_value() and unit.owner is None:
            continue
        for parameter in unused_parameters(unit):
            problems.append(f"{place(unit.path, parameter)}: {unit.name}({parameter.arg}=)")
    check(problems)
