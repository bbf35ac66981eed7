"""List the methods, or show one: definition in words, cost, source, options, published settings.

letheon methods
letheon methods salun
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tyro

from letheon.engine.distributed import Ranks
from letheon.engine.method import Method
from letheon.errors import InputError, suggest
from letheon.launch.command import run_command
from letheon.launch.console.help import describe_method
from letheon.launch.console.options import list_method_options
from letheon.launch.console.summary import console
from letheon.methods import catalogue
from letheon.saved_help import page_width


@dataclass(frozen=True, kw_only=True)
class Settings:
    """List the methods, or show one: formula, cost, source, options and published settings."""

    name: tyro.conf.Positional[str] = ""
    """Method to show, as `letheon forget` takes it."""


def main(settings: Settings, ranks: Ranks) -> None:
    """Print a line for each method, or the page of one."""
    if not ranks.main:
        return
    if console().json:
        names = [settings.name] if settings.name else [*catalogue()]
        rows = [_facts(_find(name)) for name in names]
        console().show(json.dumps(rows[0] if settings.name else rows, default=str))
    else:
        page = describe_method(_find(settings.name), page_width()) if settings.name else _list()
        print("\n".join(page))


def _find(name: str) -> type[Method]:
    """Return the method of this name.

    Raises:
        InputError: there is none of that name.
    """
    methods = catalogue()
    if name not in methods:
        raise InputError(
            f"got method {name!r}; expected one that `letheon methods` lists"
            f"{suggest(name, methods)}"
        )
    return methods[name]


def _facts(method: type[Method]) -> dict[str, Any]:
    """What the page of a method says, for programs."""
    facts = None if method.definition is None else method.definition._asdict()
    options = {one.name: one.default for one in list_method_options(method)}
    return {"name": method.name, "kind": method.kind, "definition": facts, "options": options}


def _list() -> Iterator[str]:
    """Write a line for each method, by what it is for."""
    methods = catalogue()
    column = max(map(len, methods)) + 2
    for kind in dict.fromkeys(method.kind for method in methods.values()):
        yield f"{kind}:"
        for name, method in methods.items():
            if method.kind == kind:
                facts = method.definition
                text = facts.formula if facts else (inspect.getdoc(method) or "").split("\n\n")[0]
                room = page_width() - column - 2
                yield f"  {name:<{column}}{textwrap.shorten(text, room, placeholder=' ...')}"


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
