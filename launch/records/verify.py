"""Verify the record of finished runs: manifest, signature, files, weights, log, request, reads.

    letheon verify runs/salun
    letheon verify runs/salun runs/spkd --json
    letheon verify runs/salun --replay

One line a check; --replay trains again, in a folder that is removed, and compares the weights. Exit
code 3 where something is not what the record says, and where a replay that was asked for could not
be done. A signed, replayable record of a run is what this verifies; it is no proof that a network
has forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from letheon.engine.distributed import Ranks
from letheon.errors import InputError, RunFailed
from letheon.launch.command import run_command
from letheon.launch.console.summary import console
from letheon.launch.records.checks import as_json, as_lines, check_run
from letheon.launch.records.replay import replay_run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Verify that run folders are what their manifests say."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""
    key: str | None = None
    """Ed25519 public key, in hex, by which each must be signed; default: a signature is checked
    where there is one."""
    replay: bool = False
    """Run each again by its settings, which takes as long as it took, and compare the weights."""


def main(settings: Settings, ranks: Ranks) -> None:
    """Check each run and print the lines.

    Raises:
        InputError: no folder was named.
        RunFailed: at the end, where some do not hold, or could not be replayed.
    """
    if not settings.runs:
        raise InputError("got no run folder; expected one at least; name it: letheon verify FOLDER")
    if not ranks.main:
        return
    checks = {str(run): check_run(run, settings.key) for run in settings.runs}
    for run in settings.runs if settings.replay else ():
        checks[str(run)].append(replay_run(run))
    if console().json:
        console().show(as_json(checks))
    else:
        for run in settings.runs:
            print("\n".join(as_lines(run, checks[str(run)])))
    failed = [run for run, found in checks.items() if any(c.state == "mismatch" for c in found)]
    if failed:
        raise RunFailed(f"got {', '.join(failed)}; expected what the record says; run it again")
    replays = [found[-1] for found in checks.values()] if settings.replay else []
    if left := [check.text for check in replays if check.state != "ok"]:
        raise RunFailed(f"got {len(left)} of {len(replays)} runs not replayed: {left[0]}")


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
