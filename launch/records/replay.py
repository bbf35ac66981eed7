"""`--config FILE`: the command line of an earlier run, read from its settings.json; its replay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from letheon.errors import InputError
from letheon.launch.joblist import method_at
from letheon.launch.records.checks import Check
from letheon.processes import PARENT
from letheon.sealed import read_json

OPTION = "--config"
_OF_THIS_CALL = ("config", "jobs", "overwrite")  # what a replay says for itself


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
    if methods:
        settings.pop("planting", None)  # of a training; other runs read it from the weights
    named = {option_name(word) for word in rest if word.startswith("--")}
    words = [*option_words(settings, named)]
    if methods and method_at(rest, methods, flags) < len(rest):
        return [*(w for w in words if not w.startswith("--recipe=")), *rest]
    if not methods:
        return [*words, *option_words(method, named), *rest]
    return [*words, *method_words(method, Path(value), named), *rest]


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path)
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
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
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


def option_name(word: str) -> str:
    """Return an option without dashes, ``no-`` and value, as settings spell it."""
    return word.partition("=")[0].removeprefix("--").replace("_", "-").removeprefix("no-")


def replay_run(folder: Path) -> Check:
    """Train a finished run again by its settings, and compare the digests of the weights.

    On one process, with as many threads as it had, from the folder where the command is given, as
    relative paths in the settings are.

    Returns:
        ``unknown`` where it cannot be trained here: it had several ranks, or its data, original or
        key are gone.
    """
    try:
        weights, versions = (read_json(folder / name) for name in ("run.json", "versions.json"))
        digest, world, threads = str(weights["weights"]), versions["world"], versions["threads"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Check("replay", "unknown", f"the record cannot be read ({error})")
    if world != 1:
        return Check("replay", "unknown", f"it ran on {world} ranks: run its settings on as many")
    script = "forget" if (folder / "request.json").is_file() else "train"
    with tempfile.TemporaryDirectory(prefix="letheon-replay-") as place:
        out = Path(place) / "run"
        command = [sys.executable, "-m", f"letheon.launch.{script}"]
        ended = subprocess.run(
            [*command, OPTION, str(folder / "settings.json"), "--out", str(out), "--sign", "None"],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or [""])[-1]
            return Check("replay", "unknown", f"it cannot be run here: {last[:200]}")
        again = str(read_json(out / "run.json")["weights"])
    if again != digest:
        text = f"the weights came out as {again[:12]}, and the record says {digest[:12]}"
        return Check("replay", "mismatch", f"{text}; compare versions.json with this machine")
    return Check("replay", "ok", f"trained again, the weights are {again[:12]} to the bit")
