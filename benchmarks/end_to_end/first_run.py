"""Seconds of each command of docs/first-run.md, from a fresh clone in a clean shell to the report.

    python benchmarks/end_to_end/first_run.py

Needs git, make and the package index; nothing of this checkout but its commits. Writes the table
between the marks of the page.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "first-run.md"
START, END = "<!-- seconds:start -->", "<!-- seconds:end -->"
KEEP = ("PATH", "LANG", "SSL_CERT_FILE")  # and what pip needs to find its index
MARK = "@@seconds"


def read_commands() -> list[str]:
    """Return the lines of the page's first block of shell, without comments."""
    [block, *_] = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(r"\s+#.*", "", line) for line in block.splitlines() if line.strip()]


class Step(NamedTuple):
    """A command with the seconds it took."""

    command: str
    wall: float
    processor: float


def run(folder: Path) -> list[Step]:
    """Clone into a folder and run the commands one after another in one shell."""
    env = {k: v for k, v in os.environ.items() if k in KEEP or k.startswith("PIP_")}
    env |= {"HOME": str(folder), "TERM": "dumb"}
    clone = folder / "letheon"
    commands = [f"git clone --quiet {ROOT} {clone}; cd {clone}", "make install", *read_commands()]
    spent = folder / "times"  # `times` in a substitution would be of that alone
    mark = f"times >{spent}; echo {MARK} $(date +%s.%N) $(tail -1 {spent})"
    lines = ["set -e", mark, *(f"{command}\n{mark}" for command in commands)]
    shell = subprocess.Popen(
        ["bash", "-c", "\n".join(lines)], cwd=folder, env=env, stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout is not None
    marks: list[tuple[float, float]] = []
    for line in shell.stdout:
        if line.startswith(MARK):
            _, now, *times = line.split()
            marks.append((float(now), sum(map(read_seconds, times))))
        else:
            print(line, end="", flush=True)
    if shell.wait():
        sys.exit(f"error: {commands[len(marks) - 1]!r} ended with {shell.returncode}")
    names = ["git clone", *commands[1:]]
    return [
        Step(name, after[0] - before[0], after[1] - before[1])
        for name, (before, after) in zip(names, pairwise(marks), strict=True)
    ]


def read_seconds(text: str) -> float:
    """Read a time of the shell's `times`, such as 1m2.345s."""
    minutes, _, seconds = text.removesuffix("s").partition("m")
    return 60 * float(minutes) + float(seconds)


def describe_machine() -> str:
    """Return processor, cores and Python of this machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}"


def write(steps: list[Step]) -> None:
    """Write the table between the marks of the page."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    rows = [f"| `{one.command}` | {one.wall:.1f} | {one.processor:.1f} |" for one in steps]
    wall, processor = sum(one.wall for one in steps), sum(one.processor for one in steps)
    rows.append(f"| together | {wall:.1f} | {processor:.1f} |")
    load = os.getloadavg()[1] / len(os.sched_getaffinity(0))
    text = "\n".join(
        [
            START,
            "| command | seconds | of processors |",
            "|---|---:|---:|",
            *rows,
            "",
            f"Once, at commit {revision}, on {datetime.now(UTC):%Y-%m-%d}: {describe_machine()}, "
            f"no GPU used, load {load:.1f} a core.",
            "`python benchmarks/end_to_end/first_run.py` clones, runs these lines in a clean shell "
            "and writes this table.",
            END,
        ]
    )
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    PAGE.write_text(before + text + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write(run(Path(name)))
