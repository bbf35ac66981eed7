"""TAB after `letheon`, asked of the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from letheon.launch.console.completion import list_words, spell, write_completion
from letheon.launch.main import COMMANDS
from letheon.methods import METHODS
from tests.launch_tools import Scripts

LINES = {
    "letheon for": {"forget"},
    "letheon forget --wei": {"--weights"},
    "letheon forget --loader re": {"resident"},
    "letheon forget --weights x sal": {"salun", "salun-soft"},
    "letheon forget --weights x salun --dens": {"--density"},
    "letheon forget --weights x finetune --dens": set(),
    "letheon train --no-chan": {"--no-channels-last"},
    "letheon completion ": {"bash", "zsh", "fish"},
    "letheon methods salun-": {"salun-soft"},
    "letheon nothing --x": set(),
}
"""What is typed before TAB, and the words that it leaves."""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "it.bash").write_text(write_completion("bash"))
    (tmp_path / "a file").touch()
    script = (
        'source "$0"; for line in "$@"; do read -ra COMP_WORDS <<< "$line"\n'
        '[[ $line == *" " ]] && COMP_WORDS+=("")\n'
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _letheon; echo "${COMPREPLY[*]}"; done\n'
        "complete -p letheon"
    )
    command = ["bash", "--norc", "-uc", script, str(tmp_path / "it.bash"), *LINES]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    *answers, told = ended.stdout.splitlines()
    assert {k: set(v.split()) for k, v in zip(LINES, answers, strict=True)} == LINES
    assert "-o default" in told  # names of files, where nothing else stands
    assert ended.stderr == ""


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish_completes(tmp_path: Path) -> None:
    (tmp_path / "it.fish").write_text(write_completion("fish"))
    for line, words in LINES.items():
        if words:
            command = ["fish", "--no-config", "-c", f"source it.fish; complete -C '{line}'"]
            ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            assert words == {text.split("\t")[0] for text in ended.stdout.splitlines()}, line


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_reads_it(tmp_path: Path) -> None:
    (tmp_path / "_letheon").write_text(write_completion("zsh"))
    subprocess.run(["zsh", "-fn", str(tmp_path / "_letheon")], check=True)


def test_every_command_and_option_is_completed(scripts: Scripts) -> None:
    words = list_words()
    assert list(words) == list(COMMANDS) and set(words["forget"].methods) >= set(METHODS)
    for shell in ("bash", "zsh"):
        text = write_completion(shell)
        assert all(spell(one) in text for of in words.values() for one in of.options)
    ended = scripts("completion", "bash")
    assert ended.code == 0 and ended.out == write_completion("bash")
    ended = scripts("completion", "tcsh")
    assert ended.code == 2
