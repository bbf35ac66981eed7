"""The command that is useful after another: as a shell takes it, to folders that are free."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from letheon.folders import free_path

_SCRIPTS = Path(__file__).resolve().parents[1]


def command_line(name: str, words: Sequence[object]) -> str:
    """Write a command as this process was started: by `letheon`, or by the script's path."""
    start, rest = sys.argv[0], shlex.join(map(_word, words))
    if start.startswith("letheon ") or not start.endswith(".py"):
        return f"letheon {name} {rest}"
    script = Path(start).with_name(f"{name}.py")
    script = script if script.is_file() else _SCRIPTS / script.name
    return f"{_interpreter()} {shlex.quote(_word(script))} {rest}"


def _interpreter() -> str:
    """Write this Python by its name where a shell finds it so, else by its path."""
    name = Path(sys.executable).name
    return name if shutil.which(name) == sys.executable else shlex.quote(sys.executable)


def _word(value: object) -> str:
    """A path that begins with a dash would be an option."""
    return f"./{value}" if isinstance(value, Path) and str(value).startswith("-") else str(value)


def free_beside(folder: Path, name: str) -> Path:
    """Choose a folder for the next command's output: beside this one, where nothing lies yet."""
    return free_path(folder.with_name(name))


def changed_options(settings: Any, names: Collection[str]) -> Iterator[object]:
    """Write the options of these names that are not at their defaults, those inside them too.

    Args:
        settings: a dataclass of settings.
        names: of its fields; of one that is a dataclass all that it holds is meant.
    """
    for one in fields(settings):
        value = getattr(settings, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if one.name not in names or value is None or value == default:
            continue
        option = f"--{one.name.replace('_', '-')}"
        if is_dataclass(value):
            yield from changed_options(value, [inner.name for inner in fields(value)])
        elif isinstance(value, bool):
            yield option if value else f"--no-{option[2:]}"
        elif isinstance(value, tuple):
            yield from (option, *value)
        elif str(value).startswith("-"):
            yield f"{option}={value}"
        else:
            yield from (option, value)
