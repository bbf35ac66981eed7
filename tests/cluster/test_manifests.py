"""Manifests of container platforms: they parse, and what they start is a command of ours."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from letheon.launch import forget
from tests.launch_tools import ROOT

yaml = pytest.importorskip("yaml", reason="needs PyYAML")
FOLDER = ROOT / "launch" / "containers"


def command_lines(file: Path) -> list[list[str]]:
    """What a manifest starts, as words."""
    found: list[list[str]] = []

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            if isinstance(part.get("command"), list):
                found.append([*part["command"], *part.get("args", [])])
            if isinstance(part.get("run"), str):
                text = part["run"].replace("\\\n", " ")
                found.extend(shlex.split(one) for one in text.splitlines() if "torchrun" in one)
            for value in part.values():
                walk(value)
        elif isinstance(part, list):
            for value in part:
                walk(value)

    for document in yaml.safe_load_all(file.read_text()):
        walk(document)
    return found


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_a_manifest_starts_a_command_that_parses(file: Path) -> None:
    lines = command_lines(file)
    assert len(lines) == 1
    (words,) = lines
    module = words.index("-m")
    assert words[0] == "torchrun" and words[module + 1] == "letheon.launch.forget"
    (settings,) = forget.read(words[module + 2 :])
    assert settings.forget == "class:3,8" and settings.out == Path("/runs/spkd")
    from torch.distributed.run import get_args_parser

    variables = {"$SKYPILOT_NUM_NODES": "2", "$SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    plain = [word for word in words[1:module]]
    for name, value in variables.items():
        plain = [word.replace(name, value) for word in plain]
    args = get_args_parser().parse_args([*plain, "script"])
    assert args.max_restarts == 3 and "SIGUSR1" in args.signals_to_handle


def test_the_dockerfile_names_commands_of_ours() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert any(line.startswith("FROM ") for line in lines)
    (start,) = [line for line in lines if line.startswith("CMD ")]
    assert json.loads(start.removeprefix("CMD "))[0] == "letheon"
