"""`--config FILE`: the command line of an earlier run, read from its settings.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from letheon.errors import InputError
from letheon.launch.joblist import method_at

OPTION = "--config"
_OF_THIS_CALL = ("config", "overwrite")  # what a replay says for itself


def expand_config(
    args: Sequence[str], methods: Collection[str] = (), flags: Collection[str] = ()
) -> list[str]:
    """Put the options that a settings.json holds in the place of `--config FILE`.

    What else stands on the command line wins over the file; a method there replaces the file's.

    Args:
        args: the command line without the script's name.
        methods: the names a method may have, where the script takes one.
        flags: options that take no value, with their dashes.

    Raises:
        InputError: no such file, or it holds no settings.
    """
    joined = [word.partition("=") for word in args]
    place = next((k for k, (option, _, _) in enumerate(joined) if option == OPTION), None)
    if place is None:
        return list(args)
    value = joined[place][2] if joined[place][1] else "".join(args[place + 1 : place + 2])
    rest = [*args[:place], *args[place + (1 if joined[place][1] else 2) :]]
    settings = _read(Path(value))
    if "+" in rest:
        raise InputError("got + beside a file of settings; expected one run; leave one of them out")
    method = settings.pop("method", {})
    named = {_name(word) for word in rest if word.startswith("--")}
    words = [*option_words(settings, named)]
    if methods and method_at(rest, methods, flags) < len(rest):
        return [*words, *rest]
    if not methods:
        return [*words, *option_words(method, named), *rest]
    return [*words, *method_words(method, Path(value), named), *rest]


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"got {path}, which cannot be read ({error}); expected the settings.json of a run",
            option="config",
        ) from error
    if not isinstance(settings, dict):
        raise InputError(f"got {path}; expected the settings.json of a run", option="config")
    return settings


def option_words(settings: Mapping[str, Any], named: Collection[str] = ()) -> Iterator[str]:
    """Write each setting as the option that makes it; `named` are left out."""
    for key, value in settings.items():
        option = key.replace("_", "-")
        if isinstance(value, dict):
            yield from option_words(value, named)
        elif key in (*_OF_THIS_CALL, "name") or option in named:
            continue
        elif isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        elif isinstance(value, list):
            yield from (f"--{option}", *map(str, value))
        else:
            yield f"--{option}={value}"


def method_words(
    method: Mapping[str, Any], path: Path, named: Collection[str] = ()
) -> Iterator[str]:
    """Write a method as its name and options, then the one it wraps."""
    if "name" not in method:
        raise InputError(
            f"got {path}, which does not name its method; expected settings of this version; name "
            "the method beside it",
            option="config",
        )
    inner = [v for v in method.values() if isinstance(v, dict) and "name" in v]
    yield method["name"]
    yield from option_words({k: v for k, v in method.items() if v not in inner}, named)
    for wrapped in inner:
        yield from method_words(wrapped, path, named)


def _name(word: str) -> str:
    """Return an option without dashes, ``no-`` and value, as settings spell it."""
    return word.partition("=")[0].removeprefix("--").replace("_", "-").removeprefix("no-")
