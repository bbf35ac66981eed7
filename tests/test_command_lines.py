"""What every command has in common: a mistake is one line, and --json is one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from letheon.launch.main import COMMANDS
from tests.launch_tools import SCRIPTS, Scripts


def test_every_command_is_tried_here() -> None:
    assert COMMANDS.keys() == SCRIPTS.keys()


FORGET = "--weights a --forget class:3 --out b"


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("prepare", "", "got no --source and --out; letheon prepare --help"),
        ("train", "", "got no --out;"),
        ("mask", "--out a", "got no --weights and --forget;"),
        ("forget", "", "got no --weights, --forget, --out and METHOD;"),
        ("forget", FORGET, "got no METHOD;"),
        ("forget", f"{FORGET} salun", "got salun alone; expected the method that it wraps"),
        ("forget", f"{FORGET} finetune --epochs 1.5", "got --epochs 1.5; expected a whole number;"),
        ("forget", f"{FORGET} finetune --lr x", "got --lr x; expected a number;"),
        ("train", "--out a --sizes a b", "got --sizes 'a', 'b'; expected values of another kind;"),
        ("forget", f"{FORGET} finetune --lr", "got --lr without a value; expected RATE"),
        ("forget", "--weights --forget class:3 --out b finetune", "got --weights without a value"),
        ("tune", FORGET, "got no METHOD;"),
        ("oracles", "--out a", "got no --forget;"),
        ("run", "--out a", "got no RECIPE;"),
        ("export", "--out a", "got no RUN;"),
        ("export", "a b --out c", "got b, which no option takes;"),
        ("dispose", "", "got no RUN;"),
        ("completion", "", "got no SHELL;"),
        ("completion", "tcsh", "got 'tcsh'; expected one of bash"),
        ("verify", "-run", "a name that begins with a dash is written ./-run"),
        ("train", "--out -run", "a name that begins with a dash is written ./-run"),
        ("methods", "nothing", "got method 'nothing'"),
        ("evaluate", "--mean 1 2", "got --mean without a value"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_mistake_is_one_line(
    script: str, words: str, expected: str, as_json: bool, scripts: Scripts
) -> None:
    ended = scripts(script, *words.split(), *["--json"] * as_json)
    assert ended.code == 2
    [line] = ended.err.splitlines()
    assert line.startswith("error: ") and expected in line
    if as_json:
        found = json.loads(ended.out)
        assert f"error: {found['error']}" == line and found["exit_code"] == 2
    else:
        assert ended.out == ""


def test_numbers_below_zero_and_words_behind_two_dashes_are_values(scripts: Scripts) -> None:
    assert "got lr -0.1" in scripts("train", "--out", "a", "--lr", "-1e-1").err
    assert "got -run;" in scripts("verify", "--", "-run").err.replace("/", "")


def test_json_is_one_object_of_every_command_that_shows_something(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    plan: list[object] = ["--weights", original, "--forget", "class:3", "--dry-run", "2"]
    export: list[object] = [original, "--out", tmp_path / "x.safetensors"]
    shown: dict[str, list[object]] = {
        "methods": ["salun"],
        "recipes": ["--show", "cifar10-resnet18/salun"],
        "completion": ["bash"],
        "evaluate": ["--define"],
        "train": ["--out", tmp_path / "a", "--dry-run", "2"],
        "mask": [*plan, "--out", tmp_path / "m.safetensors"],
        "forget": [*plan, "--out", tmp_path / "b", "finetune"],
        "export": export,
        "verify": [original],
        "dispose": [original, "--yes"],
    }
    found = {}
    for script, words in shown.items():
        ended = scripts(script, *words, "--json")
        assert ended.code == 0, ended.err
        found[script] = json.loads(ended.out)
    assert found["methods"]["name"] == "salun" and found["methods"]["options"]["density"] == 0.5
    assert found["recipes"]["method"]["name"] == "salun"
    assert found["export"]["out"] == str(tmp_path / "x.safetensors")
    assert "finetune on 2 ranks" in found["forget"]["plan"]
    names = [one["name"] for one in json.loads(scripts("methods", "--json").out)]
    assert "salun" in names and len(names) == len(set(names))
