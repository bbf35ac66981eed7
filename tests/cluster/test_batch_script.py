"""What the batch script of SLURM does after its command has ended; SLURM is a stand-in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch_tools import ROOT

BATCH = ROOT / "launch" / "slurm" / "forget.sbatch"
PROGRAMS = {
    "srun": 'echo "$@" >>asked; [ -z "$ENDS" ] || echo "$ENDS" >"$LETHEON_END_FILE"; exit $CODE',
    "scontrol": """
[ "$1" = show ] && { echo n1; exit; }
echo "$@" >>asked
[ -z "${SAYS:-}" ] || { echo "$SAYS" >&2; exit 1; }
[ "$(grep -c ^requeue asked)" -gt "$BUSY" ]
""",
    # As SLURM does: the script of a job that is queued again is ended while it waits.
    "sleep": 'echo "sleep $1" >>asked; [ "$1" -lt 600 ] || kill -TERM "$PPID"',
}


def end_of(folder: Path, busy: int = 0, **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, output, and what was asked of SLURM behind the start of the command."""
    for name, text in PROGRAMS.items():
        file = folder / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    known = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "BUSY": str(busy), "ENDS": ""}
    done = subprocess.run(
        ["bash", BATCH, "letheon", "forget", "--out", "runs/a", "spkd"], cwd=folder,
        env={**env, **known, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    start, *asked = (folder / "asked").read_text().splitlines()
    assert "--module letheon.launch.main forget --out runs/a spkd" in start
    return done.returncode, done.stdout, asked


@pytest.mark.parametrize(
    ("code", "ends", "expected"),
    [("0", "", 0), ("1", "2 error: got no such folder", 2), ("1", "3 error: not finite", 3)],
)
def test_a_command_that_would_end_so_again_is_not_queued(
    tmp_path: Path, code: str, ends: str, expected: int
) -> None:
    ended, text, asked = end_of(tmp_path, CODE=code, ENDS=ends)
    assert ended == expected and ends in text and not asked


@pytest.mark.parametrize("ends", ["", "75 stopped: runs/a: saved after step 3, in epoch 0"])
def test_a_command_that_was_stopped_or_killed_is_queued_again(tmp_path: Path, ends: str) -> None:
    ended, text, asked = end_of(tmp_path, CODE="1", ENDS=ends)
    assert ended == -15 and "queued again" in text and asked == ["requeue 7", "sleep 600"]


def test_a_job_that_slurm_has_queued_by_itself_ends_at_once(tmp_path: Path) -> None:
    """As after a lost node: a script that waits on keeps the job from its next turn."""
    said = "Job is pending execution for job 7"
    ended, text, asked = end_of(tmp_path, CODE="1", SAYS=said)
    assert ended == 1 and said in text and asked == ["requeue 7"]


def test_a_busy_controller_is_asked_again(tmp_path: Path) -> None:
    ended, _, asked = end_of(tmp_path, busy=2, CODE="1")
    again = ["requeue 7", "sleep 5", "requeue 7", "sleep 15", "requeue 7", "sleep 600"]
    assert ended == -15 and asked == again


def test_a_controller_that_never_answers_is_named(tmp_path: Path) -> None:
    ended, text, asked = end_of(tmp_path, busy=99, CODE="1")
    assert ended == 1 and asked.count("requeue 7") == 5
    assert "submit the same job once more" in text


def test_the_last_turn_is_said(tmp_path: Path) -> None:
    ended, text, asked = end_of(tmp_path, CODE="1", TURNS="3", SLURM_RESTART_COUNT="3")
    assert ended == 1 and "unfinished after 3 turns" in text and not asked
