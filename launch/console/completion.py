"""Print what a shell needs to complete `letheon` by TAB: commands, options, methods, choices.

    letheon completion bash > ~/.local/share/bash-completion/completions/letheon
    letheon completion zsh > ~/.zfunc/_letheon
    letheon completion fish > ~/.config/fish/completions/letheon.fish

The names are those that --help lists; a shell that has them starts no Python. Print it again after
an update.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import tyro

from letheon.engine.distributed import Ranks
from letheon.launch.command import run_command
from letheon.launch.console.options import (
    HELP,
    Option,
    list_method_options,
    list_options,
    takes_method,
)
from letheon.launch.console.summary import OPTIONS, console
from letheon.launch.main import COMMANDS, find_script
from letheon.methods import catalogue

TOP = ("--help", "--version")
EVERYWHERE = (*OPTIONS, *HELP)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Print the completion of a shell, which lists commands, options, methods and choices."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell that is to complete: bash, zsh or fish."""


@dataclass(frozen=True)
class Words:
    """What may stand behind one command."""

    options: list[Option]
    methods: Mapping[str, list[Option]]
    """Method -> its options; empty where the command takes none."""
    plain: list[str]
    """Words without dashes; where there are none, names of files are completed."""


def list_words() -> dict[str, Words]:
    """List what may stand behind each command."""
    methods = {name: list_method_options(method) for name, method in catalogue().items()}
    found = {}
    for name in COMMANDS:
        settings = import_module(find_script(name)).Settings
        own = methods if takes_method(settings) else {}
        options = list_options(settings)
        values = [str(value) for one in options if one.positional for value in one.choices]
        named = [one for one in options if not one.positional]
        found[name] = Words(named, own, [*(methods if name == "methods" else own), *values])
    return found


def spell(option: Option) -> str:
    """Write an option as it changes something: a switch that is on is turned off."""
    off = option.kind is bool and option.default is True
    return f"--no-{option.flag.removeprefix('--')}" if off else option.flag


def _spell_all(options: Iterable[Option]) -> str:
    return " ".join(map(spell, options))


def _values(options: Iterable[Option]) -> dict[str, list[str]]:
    """Values -> the options that take them; those without a closed set are under the empty text."""
    by_flag: dict[str, dict[str, None]] = {}
    for option in options:
        if option.kind is not bool:
            by_flag.setdefault(option.flag, {}).update(dict.fromkeys(map(str, option.choices)))
    found: dict[str, list[str]] = {}
    for flag, values in by_flag.items():
        found.setdefault(" ".join(values), []).append(flag)
    return found


def _cases(words: Mapping[str, Words]) -> Iterator[str]:
    """Write what bash and zsh share: `offer` becomes what may stand, or `files` is set."""
    yield f"  if [ $place -eq 1 ]; then offer={shlex.quote(' '.join([*words, *TOP]))}; fi"
    yield "  case $command in"
    for name, of in words.items():
        own = [option for options in of.methods.values() for option in options]
        yield f"    {name})"
        yield "      case $before in"
        for values, flags in _values([*of.options, *own]).items():
            offer = f"offer={shlex.quote(values)}" if values else "files=1"
            yield f"        {'|'.join(flags)}) {offer} ;;"
        yield "      esac"
        yield "      case $offer$files:$current in"
        flags_text = " ".join([_spell_all(of.options), *EVERYWHERE]).strip()
        yield f"        :-*) offer={shlex.quote(flags_text)}"
        if of.methods:
            yield '          for word in "${line[@]}"; do case $word in'
            for method, options in of.methods.items():
                yield f'            {method}) offer="$offer {_spell_all(options)}" ;;'
            yield "          esac; done"
        yield "          ;;"
        yield f"        :*) offer={shlex.quote(' '.join(of.plain))} ;;"
        yield "      esac ;;"
    yield "  esac"


_BASH = """\
# Completion of letheon in bash: letheon completion bash
_letheon() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} place=$COMP_CWORD
  local command= offer= files= word line=("${{COMP_WORDS[@]}}")
  if [ "$current" = "=" ]; then current=  # bash splits --option=value at the sign
  elif [ "$before" = "=" ]; then before=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  if [ "$place" -gt 1 ]; then command=${{line[1]}}; fi
{cases}
  COMPREPLY=($(compgen -W "$offer" -- "$current"))
}}
complete -o default -F _letheon letheon
"""
_ZSH = """\
#compdef letheon
# Completion of letheon in zsh: letheon completion zsh
_letheon() {{
  local current=$words[CURRENT] before=$words[CURRENT-1] place=$((CURRENT - 1))
  local command= offer= files= word
  local -a line=("${{words[@]}}")
  if [ $place -gt 1 ]; then command=$words[2]; fi
{cases}
  if [ -n "$offer" ]; then compadd -- ${{=offer}}; else _files; fi
}}
if [ "$funcstack[1]" = _letheon ]; then _letheon "$@"; else compdef _letheon letheon; fi
"""


def _fish(words: Mapping[str, Words]) -> Iterator[str]:
    """Write one line a word, with its text."""

    def line(condition: str, rest: str, text: str) -> str:
        return f"complete -c letheon -n {shlex.quote(condition)} {rest} -d {_quote(text)}"

    yield "# Completion of letheon in fish: letheon completion fish"
    for name, text in COMMANDS.items():
        yield line("__fish_use_subcommand", f"-xa {name}", text)
    for name, of in words.items():
        here = f"__fish_seen_subcommand_from {name}"
        having: dict[str, tuple[Option, list[str]]] = {}
        for method, options in of.methods.items():
            yield line(here, f"-a {method}", "method")
            for option in options:
                having.setdefault(spell(option), (option, []))[1].append(method)
        parts = [(here, option) for option in of.options]
        for option, methods in having.values():
            parts.append((f"{here}; and __fish_seen_subcommand_from {' '.join(methods)}", option))
        for value in of.plain:
            if value not in of.methods:
                yield line(here, f"-xa {value}", "")
        for condition, option in parts:
            takes = "" if option.kind is bool else "-r"
            if option.choices:
                takes = f"-xa {shlex.quote(' '.join(map(str, option.choices)))}"
            rest = f"-l {spell(option).removeprefix('--')} {takes}"
            yield line(condition, rest.rstrip(), option.text)


def _quote(text: str) -> str:
    """Quote a text for fish, in whose single quotes two characters need a backslash."""
    return "'" + text[:80].replace("\\", "\\\\").replace("'", "\\'") + "'"


def write_completion(shell: str) -> str:
    """Write the completion of a shell."""
    words = list_words()
    if shell == "fish":
        return "\n".join(_fish(words)) + "\n"
    cases = "\n".join(_cases(words))
    return (_BASH if shell == "bash" else _ZSH).format(cases=cases)


def main(settings: Settings, ranks: Ranks) -> None:
    """Print it."""
    if ranks.main:
        console().show_text("completion", write_completion(settings.shell).rstrip("\n"))


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
