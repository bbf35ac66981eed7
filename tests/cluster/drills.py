"""What the drills on many nodes share: the command, the state of its run, and the table."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.launch_tools import ROOT, torchrun
from tests.patience import PATIENCE

TRAIN = (
    "--data", "digits", "--model", "small", "--lr", "0.05", "--device", "cpu",
    "--save-every", "15steps", "--timeout", str(PATIENCE),
)  # fmt: skip
SCRIPT = str(ROOT / "launch" / "train.py")
HELD = str(ROOT / "tests" / "cluster" / "beds" / "held_train.py")
"""The same, which waits in the middle while the file that `HOLD` names is there."""
HELD_EVALUATE = str(ROOT / "tests" / "cluster" / "beds" / "held_evaluate.py")
HOLD = "LETHEON_HOLD"


def newest_state(out: Path) -> int:
    """The number of the newest state of a run; 0 where there is none."""
    return max((int(file.stem) for file in out.glob("state/*.json")), default=0)


def make_models(folder: Path) -> tuple[str, ...]:
    """Train and forget on one rank; returns what evaluate is told of both, but for --out."""
    data = ("--data", "digits", "--device", "cpu")
    original, run = str(folder / "original"), str(folder / "spkd")
    first = (*data, "--weights", original, "--forget", "class:3", "--out", run)
    ends = [
        torchrun(1, "train", *TRAIN, "--epochs", "3", "--out", original),
        torchrun(1, "forget", *first, "spkd", "--epochs", "1"),
    ]
    assert [end.code for end in ends] == [0, 0], ends
    return (*data, "--original", original, "--runs", run, "--timeout", str(PATIENCE))


def rows_of(table: Path) -> object:
    """The rows of a finished evaluation."""
    return json.loads((table / "metrics.json").read_text())


def weights_of(out: Path) -> str:
    """The digest of a finished run's weights."""
    return str(json.loads((out / "run.json").read_text())["weights"])


def note(drill: str, fault: str, outcome: str, lost: float | None = None) -> None:
    """Add a row to the table that `make cluster` prints; a drill without a clock has no seconds."""
    if table := os.environ.get("LETHEON_DRILLS"):
        with open(table, "a") as file:
            seconds = "-" if lost is None else f"{max(lost, 0):.0f}"
            file.write(f"| {drill} | {fault} | {outcome} | {seconds} |\n")
