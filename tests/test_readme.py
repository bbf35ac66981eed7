"""What a page says can be typed, can be typed; what it names and links to is there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import letheon
from letheon.errors import InputError
from letheon.launch.command import parse
from letheon.launch.main import COMMANDS
from letheon.methods import METHODS, catalogue
from tests.launch_tools import ROOT, SCRIPTS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
PROGRAMS = ("make", "python", "python3", "torchrun", "letheon", "pip", "sh")
FOLDERS = "launch|engine|eval|loaders|kernels|methods|benchmarks|tests|docs|letheon"
on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def shell_lines(text: str) -> Iterator[str]:
    """The lines of shell in a page: fenced blocks, indented blocks and inline code.

    Python blocks and drawings are left out; a line that ends in a backslash goes on.
    """
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    blocks = [body for kind, body in fenced if kind in ("", "sh", "bash", "console", "shell")]
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    blocks += re.findall(r"^(?: {4}\S[^\n]*\n)+", text, re.M)
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`]+)`", text):
        yield code.replace("\n", " ")


def commands(page: Path) -> list[list[str]]:
    """Every command of a page as words, without the variables set before it."""
    found = []
    for line in shell_lines(page.read_text(encoding="utf-8")):
        line = re.sub(r"(^|\s)#(\s.*)?$", "", line.strip().removeprefix("$ "))
        for part in re.split(r";|&&|\|", line):
            try:
                words = shlex.split(part)
            except ValueError:
                continue  # an apostrophe: prose
            while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] in ("do", "then")):
                words = words[1:]
            program = words[0].rsplit("/", 1)[-1] if words else ""
            script = words and re.fullmatch(r"(launch|benchmarks)/\w+\.(py|sh)", words[0])
            if program in PROGRAMS and (len(words) > 1 or program == "make"):
                found.append([program, *words[1:]])
            elif script and len(words) > 1:
                found.append(["python", *words])
    return found


@cache
def fields_of(kind: Any) -> frozenset[str]:
    """The options that a settings class gives, those inside it and its methods included."""
    if get_origin(kind) is not None:
        return frozenset().union(*map(fields_of, get_args(kind)))
    if not dataclasses.is_dataclass(kind):
        return frozenset()
    hints = get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    return frozenset(names).union(*(fields_of(hints[n]) for n in names if n in hints))


@cache
def options_of(script: str) -> frozenset[str]:
    """Every option of a script, methods' options included, as names of Python."""
    methods = [fields_of(m) for m in catalogue().values()] if script in ("forget", "tune") else []
    everywhere = frozenset({"quiet", "json"})
    return fields_of(SCRIPTS[script].Settings).union(everywhere, *methods)


def flags(words: list[str]) -> list[str]:
    """The options among words, as names of Python."""
    return [w[2:].partition("=")[0].replace("-", "_") for w in words if re.match(r"--[a-z]", w)]


def check_script(name: str, words: list[str]) -> None:
    """Parse a call of one of our scripts; an unfinished call must name known options."""
    for flag in flags(words):
        known = {*options_of(name), "help"}
        assert {flag, flag.removeprefix("no_")} & known, f"{name} has no option {flag}"
    given = flags(words)
    required = [
        f.name
        for f in dataclasses.fields(SCRIPTS[name].Settings)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    unfinished = "..." in words or any(re.fullmatch(r"[A-Z]{4,}|\[\w+\]", w) for w in words)
    if unfinished or "help" in given or not set(required) - {"method"} <= set(given):
        return
    if name in ("forget", "tune"):
        SCRIPTS[name].read(words)
    else:
        parse(SCRIPTS[name].Settings, words)


def check_benchmark(path: Path, words: list[str]) -> None:
    """Each option of a benchmark is a name of its source or of a file it imports."""
    sources = "\n".join(p.read_text(encoding="utf-8") for p in path.parent.glob("*.py"))
    for flag in flags(words):
        known = re.search(rf"\b{flag}\s*:|--{flag.replace('_', '-')}\b", sources)
        assert known or flag.startswith("no_"), f"{path.name} has no option {flag}"


def check_command(words: list[str]) -> None:
    """Fail where a program, script, target, option or method of a command does not exist."""
    program, rest = words[0], words[1:]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            variable, equals, _ = word.partition("=")
            if equals:
                assert f"{variable}" in makefile, f"the Makefile has no variable {variable}"
            elif re.fullmatch(r"[a-z-]+", word):
                assert re.search(rf"^{word}:", makefile, re.M), f"no target {word}"
        return
    if program == "pip":
        extras = [extra for word in rest for extra in re.findall(r"\[([\w,-]+)\]", word)]
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        for extra in ",".join(extras).split(",") if extras else []:
            assert f'"{extra}": [' in setup, f"no extra {extra}"
        assert not any(re.match(r"letheon\b", word) for word in rest), "not on the index"
        return
    if program == "letheon":
        assert rest[0] in {*COMMANDS, "--help", "--version"} or rest[0].isupper(), rest[0]
        if rest[0] in SCRIPTS:
            check_script(rest[0], rest[1:])
        return
    for place, word in enumerate(rest):
        module = re.fullmatch(r"letheon\.launch\.(\w+)", word)
        script = re.fullmatch(rf"(?:{FOLDERS})/[\w/]+\.(?:py|sh)", word)
        name = module[1] if module else Path(word).stem
        if script:
            assert (ROOT / word).is_file(), f"there is no {word}"
        if module and name == "main":  # the command itself, for torchrun
            check_command(["letheon", *rest[place + 1 :]])
            return
        if module or (script and word.startswith("launch/") and word.endswith(".py")):
            assert name in SCRIPTS or name.isupper(), f"no script {name}"
            if name in SCRIPTS:
                check_script(name, rest[place + 1 :])
            return
        if script and word.startswith("benchmarks/"):
            check_benchmark(ROOT / word, rest[place + 1 :])
            return


@on_every_page
def test_every_command_can_be_typed(page: Path) -> None:
    for words in commands(page):
        try:
            check_command(words)
        except (SystemExit, InputError) as end:
            raise AssertionError(f"{shlex.join(words)}: refused by the parser") from end
        except AssertionError as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error


def test_commands_are_found_on_the_pages_that_have_some() -> None:
    """A reader of pages that finds nothing would pass everything."""
    counts = {str(page.relative_to(ROOT)): len(commands(page)) for page in PAGES}
    least = {
        "README.md": 10, "CONTRIBUTING.md": 2, "docs/benchmarks.md": 10, "docs/evaluation.md": 1,
        "docs/loaders.md": 3, "docs/methods.md": 1, "docs/migration.md": 12, "docs/step.md": 4,
        "docs/results/cifar10-cpu.md": 1, "docs/results/imagenet-lite0-pacs.md": 1,
        "docs/results/tiny-imagenet-pacs.md": 1,
    }  # fmt: skip
    assert {name: counts[name] for name in least if counts[name] < least[name]} == {}


def test_a_wrong_command_is_noticed() -> None:
    wrong = [
        "make nothing", "pip install '.[nothing]'", "letheon nothing", "python launch/nothing.py",
        "python launch/train.py --nothing 1", "python benchmarks/bench_step.py --nonsense",
        "torchrun -m letheon.launch.nothing", "pip install letheon",
        "python launch/forget.py --weights a --forget class:1 --out b finetune --lrr 1",
        "python launch/forget.py --weights a --forget class:1 --out b --lr 1 nothing",
    ]  # fmt: skip
    for line in wrong:
        with pytest.raises((AssertionError, SystemExit, InputError)):
            check_command(shlex.split(line))
            pytest.fail(f"not noticed: {line}", pytrace=False)


@on_every_page
def test_every_option_in_prose_exists(page: Path) -> None:
    """Inline code that begins with two dashes; `migration.md` names other people's options."""
    if page.name == "migration.md":
        return
    torchrun = {"standalone", "nproc_per_node", "nnodes", "max_restarts", "virtual_local_rank"}
    known = frozenset({"help", "version", *torchrun})
    known = known.union(*(options_of(name) for name in SCRIPTS))
    sources = "\n".join(p.read_text() for p in (ROOT / "benchmarks").glob("*.py"))
    for code in re.findall(r"`(--[a-z][^`]*)`", page.read_text(encoding="utf-8")):
        for flag in flags(code.split()):
            in_benchmarks = re.search(rf"\b{flag}: ", sources)
            assert flag.removeprefix("no_") in known or flag in known or in_benchmarks, code


@on_every_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Inline code that is a path of this repository; a star stands for any name."""
    problems = []
    for code in re.findall(r"`([^`\s]+)`", page.read_text(encoding="utf-8")):
        path = code.split("::")[0].rstrip(",;.")
        if not re.fullmatch(rf"(?:{FOLDERS})/[\w./*?-]*", path) or "..." in path:
            continue
        if not list(ROOT.glob(path.rstrip("/"))):
            problems.append(path)
    assert problems == []


@on_every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@on_every_page
def test_python_examples_call_what_exists(page: Path) -> None:
    """Names of `letheon.` are public, and their arguments fit."""
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M
    ):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "letheon":
                assert node.attr in letheon.__all__, node.attr
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("letheon."):
                function = getattr(letheon, ast.unparse(node.func).removeprefix("letheon."))
                words = {k.arg: None for k in node.keywords if k.arg is not None}
                inspect.signature(function).bind(*node.args, **words)


@on_every_page
def test_python_examples_name_what_they_define(page: Path) -> None:
    """Imports and all: what a page's blocks use, one of them has made."""
    if blocks := python_blocks(page):
        ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
        ended = subprocess.run(
            [*ruff, "--stdin-filename", "page.py", "-"],
            input="\n".join(blocks), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout


def test_the_site_has_every_page() -> None:
    """`make docs` refuses a page that `nav` leaves out; so does this, in no time."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[2:]]
    assert [page for page in pages if f": {page}\n" not in nav] == []


def test_the_readme_shows_every_script_and_method() -> None:
    shown = " ".join(" ".join(words) for words in commands(PAGES[0]))
    assert all(f"launch/{name}.py" in shown or f"letheon {name}" in shown for name in SCRIPTS)
    assert all(f"`{name}`" in README for name in METHODS)


def test_every_method_is_explained() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in METHODS)


def python_blocks(page: Path) -> list[str]:
    """The fenced blocks of Python in a page, one after another."""
    return re.findall(r"^```py(?:thon)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize(
    "name", [pytest.param("README.md", marks=pytest.mark.slow), "docs/python.md"]
)
def test_the_python_of_a_page_runs_as_it_stands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each block in an empty folder, with no names but its own; where it says epochs, with one."""
    blocks = python_blocks(ROOT / name)
    assert blocks
    for place, block in enumerate(blocks):
        folder = tmp_path / str(place)
        folder.mkdir()
        monkeypatch.chdir(folder)
        exec(re.sub(r"\bepochs=\d+", "epochs=1", block), {"__name__": "__main__"})
        assert "FA %" in capsys.readouterr().out
        assert [*folder.iterdir()]  # what the block says it leaves
