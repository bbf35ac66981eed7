"""The plan of the house: which folder imports which, limits, words, and who writes files.

Every test is parametrized by folder, so that `pytest tests/test_house.py -k loaders` shows what one
folder owes. A message is a list of file:line. Its second half is `test_reachability.py`.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.house import (
    FLOORS,
    HOUSE,
    ROOT,
    WHEEL,
    Function,
    check,
    decorators,
    in_every_folder,
    in_the_code,
    in_the_house,
    nodes,
    parameters,
    parents,
    parse,
    place,
    sources,
    walk,
)  # fmt: skip

# ---------------------------------------------------------------------------- floors and circles


def module_name(path: Path) -> str:
    """The name a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("letheon", *parts) if parts and parts[0] in WHEEL else parts)


def imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every module that a file imports; `from a import b` gives a and a.b."""
    for node in walk(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            yield node.module, node
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def folder_of(module: str) -> str | None:
    """The folder of the house that a module lies in; None for other people's modules."""
    parts = module.split(".")
    if parts[0] == "letheon":
        return parts[1] if len(parts) > 1 and parts[1] in WHEEL else "letheon"
    return parts[0] if parts[0] in FLOORS else None


def deferred(node: ast.AST) -> bool:
    """True inside a function or `if TYPE_CHECKING`: not run when the file is imported."""
    return any(
        isinstance(around, Function)
        or (isinstance(around, ast.If) and "TYPE_CHECKING" in ast.unparse(around.test))
        for around in parents(node)
    )


@in_every_folder
def test_a_folder_imports_only_folders_below_it(folder: str) -> None:
    problems = []
    for path in sources(folder):
        face = path == ROOT / "letheon" / "__init__.py"
        for module, node in imports(path):
            other = folder_of(module)
            if module.split(".")[0] in WHEEL:
                problems.append(f"{place(path, node)}: import it as letheon.{module}")
            elif other is None or other == folder or (face and deferred(node)):
                continue
            elif FLOORS[other] >= FLOORS[folder]:
                problems.append(f"{place(path, node)}: {folder} imports {module}")
    check(problems)


def circle(graph: dict[str, dict[str, str]]) -> list[str]:
    """A circle of files as "file:line imports file", or nothing."""
    done: set[str] = set()
    for start in graph:
        trail: list[tuple[str, Iterator[str]]] = [(start, iter(graph[start]))]
        while trail:
            name, rest = trail[-1]
            following = next(rest, None)
            on_trail = [one for one, _ in trail]
            if following is None:
                done.add(name)
                trail.pop()
            elif following in on_trail:
                ring = [*on_trail[on_trail.index(following) :], following]
                return [f"{graph[a][b]} imports {b}" for a, b in pairwise(ring)]
            elif following not in done:
                trail.append((following, iter(graph[following])))
    return []


@in_every_folder
def test_no_circle_of_files(folder: str) -> None:
    """Imports at the top of files only; those inside functions are allowed to look back."""
    files = {module_name(path): path for path in sources(folder)}
    files |= {path.stem: path for path in sources(folder) if folder == "benchmarks"}
    graph: dict[str, dict[str, str]] = {}
    for name, path in files.items():
        arrows = {m: place(path, node) for m, node in imports(path) if not deferred(node)}
        graph[name] = {m: where for m, where in arrows.items() if m in files and m != name}
        parents_of_name = {name.rsplit(".", k)[0] for k in range(1, name.count(".") + 1)}
        for package in parents_of_name & graph[name].keys():
            if files[package].name == "__init__.py" and not any(
                m.startswith(f"{package}.") and m in files for m in arrows
            ):
                continue
            del graph[name][package]  # `from package import module` names the module's package
    check(circle(graph))


def test_every_folder_of_the_wheel_is_on_a_floor() -> None:
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    [folders] = [
        ast.literal_eval(node.value)
        for node in ast.walk(setup)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FOLDERS"
    ]
    assert set(folders) == set(WHEEL)


# ------------------------------------------------------------------------------------- limits


@in_every_folder
def test_files_are_at_most_500_lines(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources(folder)}
    check([f"{p.relative_to(ROOT)}: {n} lines" for p, n in lengths.items() if n > 500])


@in_every_folder
def test_folders_hold_at_most_12_files(folder: str) -> None:
    if folder in ("methods", "tests"):
        return  # one file a method, one a thing tested
    counts = Counter(path.parent for path in sources(folder) if path.name != "__init__.py")
    check([f"{p.relative_to(ROOT)}/: {n} files" for p, n in counts.items() if n > 12])


@in_every_folder
def test_functions_take_at_most_8_parameters(folder: str) -> None:
    check(
        [
            f"{place(path, node)}: {node.name} takes {len(parameters(node))} parameters"
            for path, node in nodes(folder)
            if isinstance(node, Function)
            and len(parameters(node)) > 8
            and "triton.jit" not in decorators(node)
        ]
    )


@in_every_folder
def test_classes_are_at_most_150_lines(folder: str) -> None:
    check(
        [
            f"{place(path, node)}: class {node.name} has {length} lines"
            for path, node in nodes(folder)
            if isinstance(node, ast.ClassDef)
            and (length := (node.end_lineno or 0) - node.lineno + 1) > 150
        ]
    )


@in_every_folder
def test_no_drawers_for_odds_and_ends(folder: str) -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "shared"}
    check([str(p.relative_to(ROOT)) for p in sources(folder) if p.stem in drawers])


# ---------------------------------------------------------------------------- reading and writing


@in_the_code
def test_nothing_is_unpickled(folder: str) -> None:
    problems = []
    for path, node in nodes(folder):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            loads_torch = ast.unparse(node.func) == "torch.load"
            if loads_torch and options.get("weights_only") != "True":
                problems.append(f"{place(path, node)}: torch.load without weights_only=True")
            if options.get("allow_pickle", "False") != "False":
                problems.append(f"{place(path, node)}: np.load with allow_pickle")
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name in ("pickle.load", "pickle.loads", "joblib.load", "dill.load"):
            problems.append(f"{place(path, node)}: {name}")
    check(problems)


WRITERS = {
    "write_text", "write_bytes", "save_file", "savefig", "savez", "savez_compressed", "tofile",
    "rename", "copyfile", "torch.save", "np.save", "json.dump",
}  # fmt: skip
MAY_WRITE = {  # file: why it does not go through letheon/durable.py
    "letheon/durable.py": "it is the one place",
    "letheon/folders.py": "whole folders are renamed",
    "eval/inference/cache.py": "a folder of columns that all ranks fill, renamed when whole",
    "eval/report/plots.py": "matplotlib draws into memory",
    "engine/runs/loggers.py": "a log grows a line at a time, for whoever watches",
}


def writes(call: ast.Call) -> bool:
    """True for a call that opens a file to write or writes one by name."""
    whole = ast.unparse(call.func)
    last = whole.rsplit(".", 1)[-1]
    modes = [a.value for a in call.args[:2] if isinstance(a, ast.Constant)]
    modes += [
        k.value.value
        for k in call.keywords
        if k.arg == "mode" and isinstance(k.value, ast.Constant)
    ]
    if last in ("open", "fdopen", "memmap", "open_memmap") and whole not in ("Image.open",):
        return any(isinstance(m, str) and re.fullmatch(r"[rwaxbt]*[wax+][bt+]*", m) for m in modes)
    return last in WRITERS or whole in WRITERS


@in_the_house
def test_files_are_written_only_by_durable(folder: str) -> None:
    """`durable.write`, or anything inside `with replacing(path) as temporary`."""
    check(
        [
            f"{place(path, node)}: {ast.unparse(node.func)}"
            for path, node in nodes(folder)
            if isinstance(node, ast.Call)
            and writes(node)
            and str(path.relative_to(ROOT)) not in MAY_WRITE
            and not any(
                isinstance(around, ast.With)
                and any("replacing(" in ast.unparse(i.context_expr) for i in around.items)
                for around in parents(node)
            )
        ]
    )


# -------------------------------------------------------------------------------------- words

NOT_WORDS = {
    "told", "begun", "ended", "made", "chosen", "planned", "joined", "asked", "given", "taken",
    "kept", "some", "those", "theirs", "them", "they", "drawn", "said", "meant", "whoever", "such",
    "tried", "wanted",
}  # fmt: skip
"""Participles and pronouns that say nothing about the thing; nowhere in a name."""
NOT_ALONE = NOT_WORDS | {
    "found", "here", "there", "written", "stored", "moved", "fitting", "held",
}  # fmt: skip
"""A name must not be one of these words and nothing else."""
BRITISH = re.compile(
    r"(?:optim|normal|recogn|initial|serial|general|minim|maxim|organ|summar|standard|regular|"
    r"quant|vector|categor|synchron|token|local|binar|polar)is(?:e|ed|er|es|ing|ation)|"
    r"colour|centre|neighbour|behaviour|label(?:led|ling)|grey|artefact",
    re.IGNORECASE,
)
TORCH = {"found_inf"}  # attribute names that torch gives


def words(name: str) -> list[str]:
    """The words of a name: relabelRows, _relabel_rows and RelabelRows are the same two."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return [word for word in spaced.lower().split("_") if word]


def names(folder: str) -> Iterator[tuple[Path, ast.AST, str, str]]:
    """Every name that a folder gives: functions, classes, parameters, fields, constants, files."""
    for path in sources(folder):
        yield path, parse(path), "file", path.stem
    for path, node in nodes(folder):
        in_function = any(isinstance(around, Function) for around in parents(node))
        if isinstance(node, Function | ast.ClassDef):
            if not node.name.startswith("test_"):
                yield path, node, type(node).__name__.removesuffix("Def").lower(), node.name
            if isinstance(node, Function):
                for one in parameters(node):
                    yield path, one, "parameter", one.arg
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not in_function:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield path, node, "name", target.id


@in_the_code
def test_names_are_nouns_and_verbs(folder: str) -> None:
    problems = []
    for path, node, kind, name in names(folder):
        bad = set(words(name)) & NOT_WORDS
        if len(words(name)) == 1:
            bad |= set(words(name)) & NOT_ALONE
        if bad and name not in TORCH:
            problems.append(f"{place(path, node)}: {kind} {name}")
    check(problems)


@in_the_code
def test_functions_are_not_participles(folder: str) -> None:
    """`resize(x)`, not `resized(x)`; a property may say a state, and a predicate begins with is."""
    problems = []
    for path, node in nodes(folder):
        if not isinstance(node, Function) or "property" in " ".join(decorators(node)):
            continue
        spelled = words(node.name)
        participle = len(spelled) == 1 and spelled[0].endswith("ed")
        if participle and spelled[0] not in ("seed", "embed", "feed", "need", "speed"):
            problems.append(f"{place(path, node)}: {node.name}")
    check(problems)


@in_the_code
def test_spelling_is_that_of_pytorch(folder: str) -> None:
    check(
        [
            f"{place(path, node)}: {kind} {name}"
            for path, node, kind, name in names(folder)
            if BRITISH.search(name)
        ]
    )


@pytest.mark.parametrize("folder", [folder for folder in HOUSE if folder != "launch"])
def test_no_message_below_launch_names_a_flag(folder: str) -> None:
    """A message says the setting ("loader resident"); the command line adds the flag."""
    problems = []
    for path, node in nodes(folder):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", node.value)
        around = list(parents(node))
        docstring = around and isinstance(around[0], ast.Expr)
        argument = any(
            isinstance(one, ast.Call) and ast.unparse(one.func).startswith("subprocess.")
            for one in around
        )  # of another program
        if flags and not docstring and not argument:
            problems.append(f"{place(path, node)}: {' '.join(flags)}")
    check(problems)
