"""Seconds of each command of docs/first-run.md, from a fresh clone in a clean shell to the report.

    python benchmarks/end_to_end/first_run.py
    python benchmarks/end_to_end/first_run.py --wheel

With --wheel those of the page's last block: the wheel of the clone in an empty environment, with
the dependencies that the index gives, and the notebooks, executed by Jupyter. Needs git, make and
the package index; nothing of this checkout but its commits. Writes the table between the marks of
the page.
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
KEEP = ("PATH", "LANG", "SSL_CERT_FILE")  # and what pip needs to find its index
MARK = "@@seconds"


def read_commands(block: int) -> list[str]:
    """Return the lines of one of the page's blocks of shell, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(r"\s+#.*", "", line) for line in blocks[block].splitlines() if line.strip()]


class Step(NamedTuple):
    """A command with the seconds it took."""

    command: str
    wall: float
    processor: float


def run(folder: Path, wheel: bool) -> list[Step]:
    """Clone into a folder and run the commands one after another in one shell."""
    env = {k: v for k, v in os.environ.items() if k in KEEP or k.startswith("PIP_")}
    env |= {"HOME": str(folder), "TERM": "dumb"}
    clone = folder / "letheon"
    following = read_commands(-1) if wheel else ["make install", *read_commands(0)]
    commands = [f"git clone --quiet {ROOT} {clone}; cd {clone}", *following]
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


def write(steps: list[Step], wheel: bool) -> None:
    """Write the table between its marks of the page."""
    name, options = ("wheel", " --wheel") if wheel else ("seconds", "")
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    rows = [f"| `{one.command}` | {one.wall:.1f} | {one.processor:.1f} |" for one in steps]
    wall, processor = sum(one.wall for one in steps), sum(one.processor for one in steps)
    rows.append(f"| together | {wall:.1f} | {processor:.1f} |")
    load = os.getloadavg()[1] / len(os.sched_getaffinity(0))
    text = "\n".join(
        [
            start,
            "| command | seconds | of processors |",
            "|---|---:|---:|",
            *rows,
            "",
            f"Once, at commit {revision}, on {datetime.now(UTC):%Y-%m-%d}: {describe_machine()}, "
            f"no GPU used, load {load:.1f} a core.",
            f"`python benchmarks/end_to_end/first_run.py{options}` clones, runs these lines in a "
            "clean shell and writes this table.",
            end,
        ]
    )
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(start)
    PAGE.write_text(before + text + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    of_wheel = sys.argv[1:] == ["--wheel"]
    if sys.argv[1:] and not of_wheel:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as place:
        write(run(Path(place), of_wheel), of_wheel)
