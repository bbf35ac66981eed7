"""Seconds of each command of docs/first-run.md, from a fresh clone in a clean shell to the report.

    python benchmarks/end_to_end/first_run.py

Needs git, make and the package index; nothing of this checkout but its commits. Writes the table
between the marks of the page.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "first-run.md"
START, END = "<!-- seconds:start -->", "<!-- seconds:end -->"
KEEP = ("PATH", "LANG", "SSL_CERT_FILE")  # and what pip needs to find its index
MARK = "@@seconds"


def read_commands() -> list[str]:
    """Return the lines of the page's first block of shell, without comments."""
    [block, *_] = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(r"\s+#.*", "", line) for line in block.splitlines() if line.strip()]


def run(folder: Path) -> list[tuple[str, float]]:
    """Clone into a folder and run the commands one after another in one shell.

    Returns:
        Each command with its seconds of wall clock; the last one opens the report.
    """
    env = {k: v for k, v in os.environ.items() if k in KEEP or k.startswith("PIP_")}
    env |= {"HOME": str(folder), "TERM": "dumb"}
    clone = folder / "letheon"
    start = time.monotonic()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], env=env, check=True)
    found = [("git clone", time.monotonic() - start)]
    commands = ["make install", *read_commands()]
    lines = [f"set -e\n{command}\necho {MARK} $(date +%s.%N)" for command in commands]
    shell = subprocess.Popen(
        ["sh", "-c", f"echo {MARK} $(date +%s.%N)\n" + "\n".join(lines)],
        cwd=clone, env=env, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert shell.stdout is not None
    marks: list[float] = []
    for line in shell.stdout:
        if line.startswith(MARK):
            marks.append(float(line.split()[1]))
        else:
            print(line, end="", flush=True)
    if shell.wait():
        sys.exit(f"error: {commands[len(marks) - 1]!r} ended with {shell.returncode}")
    found += zip(commands, (b - a for a, b in pairwise(marks)), strict=True)
    if browser := shutil.which("chromium"):
        report = next(clone.glob("runs/digits/table/report.html"))
        start = time.monotonic()
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--dump-dom", report.as_uri()],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        found.append(("the report in Chromium", time.monotonic() - start))
    return found


def describe_machine() -> str:
    """Return processor, cores and Python of this machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}"


def write(found: list[tuple[str, float]]) -> None:
    """Write the table between the marks of the page."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    rows = [f"| `{name}` | {seconds:.1f} |" for name, seconds in found]
    rows.append(f"| together | {sum(seconds for _, seconds in found):.1f} |")
    load = os.getloadavg()[1] / len(os.sched_getaffinity(0))
    text = "\n".join(
        [
            START,
            "| command | seconds |",
            "|---|---:|",
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
