"""What a run is made of, as text to compare: an unfinished run goes on only with the same."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.distributed import agree, gather_objects
from letheon.engine.method import Method, Run
from letheon.engine.runs.run_folder import (
    FINISHED,
    ORIGIN,
    code_digest,
    is_unfinished,
    packages,
    working_folder,
)
from letheon.errors import join_few
from letheon.sealed import read_json

if TYPE_CHECKING:
    from letheon.engine.runs.plan import Plan

_FREE = {"out", "overwrite", "saving", "tracking", "workers", "timeout", "dry_run"}
"""Settings that change no result."""


@dataclass(frozen=True)
class Start:
    """How a run starts; on ranks other than the first only whether it is resumed is known."""

    origin: dict[str, Any]
    resume: bool = False
    """It goes on with the unfinished run of its folder."""
    finished: bool = False
    """It has been done already."""
    overrides: tuple[str, ...] = ()
    """What differs from the unfinished run, and is to be overlooked."""


def plan_start(
    plan: Plan, method: Method, run: Run, out: Path, saving: SaveOptions, overwrite: bool
) -> Start:
    """Find out whether a run is to begin, to go on, or is done. Every rank must call.

    Raises:
        InputError: on every rank: the folder holds a run of something else, which is named.
    """
    start, problem = Start({}), None
    split = run.shards is not None  # then every rank has a part of the weights
    weights = weights_digest(run.model) if run.ranks.main or split else ""
    if run.ranks.main:
        origin = describe_origin(plan, method, run, weights)
        folder = working_folder(out) if overwrite else out
        before = read_origin(folder)
        odd = differences(before, origin) if before is not None else []
        finished = before is not None and (folder / FINISHED).exists()
        start = Start(origin, is_unfinished(folder), finished, tuple(odd))
        if odd and overwrite:
            start = Start(origin)
        elif odd and (finished or (start.resume and not saving.resume_anyway)):
            state = "a finished" if finished else "an unfinished"
            problem = (
                f"got {out}, which holds {state} run that differs: {join_few(odd, by='; ')}; "
                f"expected the same; {_mend(odd, finished, out)}, name another folder, allow to "
                "overwrite it, or to resume anyway"
            )
    agree(run.ranks, problem, "out")
    resume, finished, overrides = gather_objects(
        (start.resume, start.finished, start.overrides), run.ranks
    )[0]
    if resume and run.ranks.main:
        print(f"{out}: goes on with the unfinished run", file=sys.stderr)
        for line in overrides:
            print(f"{out}: overlooked: {line}", file=sys.stderr)
    return Start(start.origin, resume, finished, overrides)


def describe_origin(plan: Plan, method: Method, run: Run, weights: str) -> dict[str, Any]:
    """Settings, data, request, weights at the start, ranks and code of a run, by dotted name.

    Call it before the run is prepared, on the first rank, with the digest of its weights.
    """
    named = ((field.name, getattr(plan.job, field.name)) for field in dataclasses.fields(plan.job))
    settings = {name: value for name, value in named if name not in _FREE | {"method"}}
    known = {
        "settings": settings,
        "method": method,
        "data": plan.set_digests(),
        "request": run.request,
        "weights": weights,
        "seed": plan.seed,
        "world": run.ranks.world,
        "packages": packages(),
        "code": code_digest()[:16],  # a commit may change documents alone, an edit anything
    }
    plain: dict[str, Any] = json.loads(json.dumps(dict(_flatten(known, "")), default=str))
    plain.pop("settings.precision.compile_file", None)  # where code lies changes no result either
    return plain


def read_origin(folder: Path) -> dict[str, Any] | None:
    """Read what an earlier run in the folder was made of; None where nothing says."""
    try:
        known = read_json(folder / ORIGIN)
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def _mend(odd: Sequence[str], finished: bool, out: Path) -> str:
    """Say how the run can go on, or, where the code is another, begin anew."""
    if not all(line.startswith("code ") for line in odd):
        return "give what it was begun with"
    begin = "" if finished else f", remove it (rm -r {shlex.quote(str(out))}) to begin anew"
    return f"go back to the version of the code that it was begun with{begin}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name each thing that is not as it was, with both values; the number of ranks apart."""
    names = sorted((before.keys() | now.keys()) - {"world"})
    return [
        f"{name} {before.get(name)} before, {now.get(name)} now"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flatten(one, f"{path}.{key}" if path else str(key))
    elif dataclasses.is_dataclass(value):
        yield path, getattr(value, "name", type(value).__name__)
        for field in dataclasses.fields(value):
            yield from _flatten(getattr(value, field.name), f"{path}.{field.name}")
    else:
        yield path, value
