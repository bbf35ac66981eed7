"""What the README says can be typed, can be typed; what it links to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from letheon.launch.command import parse
from letheon.launch.forget import chosen
from letheon.methods import METHODS
from tests.launch_tools import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """Every script call in the code blocks of a text, as words."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = (line.split("   #")[0].split() for line in blocks.splitlines())
    return [line for line in lines if any(word.startswith("launch/") for word in line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        place = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        name = Path(words[place]).stem
        if name == "forget":
            chosen(words[place + 1 :])
        elif name in SCRIPTS:
            parse(SCRIPTS[name].Settings, words[place + 1 :])


def test_the_readme_shows_every_script_and_method() -> None:
    shown = " ".join(" ".join(words) for words in commands(README))
    assert all(f"launch/{name}.py" in shown for name in SCRIPTS)
    assert all(f"`{name}`" in README for name in METHODS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_make_targets_of_the_readme_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_method_is_explained() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in METHODS)
