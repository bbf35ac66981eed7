"""Everything that needs a GPU, in one call: checks, the step's ladder, then each kernel timed.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu.csv
    python benchmarks/gpu_suite.py --out rehearsal.csv --device cpu    # the same code, tiny sizes

Sections run in order and rows are written as each ends. When the time is used up, the section that
runs and those after it are left out, by name. The exit code is 0 if all checks passed, 1 if one
failed, 2 without a GPU.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gpu_steps
import torch
import tyro
from bench_kernels import BENCHES
from ceilings import ceilings
from gpu_checks import CHECKS
from harness import Row, row, show, write


@dataclass(frozen=True)
class Options:
    """What to run, and for how long."""

    out: Path = Path("benchmarks/results/gpu.csv")
    """CSV file, written anew"""
    seconds: float = 530
    """a section that is not done by then is left out"""
    repeats: int = 50
    """timed calls of each variant"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a rehearsal without a GPU; its numbers say nothing"""
    only: tuple[str, ...] = ()
    """sections to run; all, if not given"""


def checks(options: Options) -> list[Row]:
    """One row per check: its largest difference, or NaN where it failed."""
    rows = []
    for name, check in CHECKS.items():
        try:
            worst = check(options.device)
        except Exception as error:  # a kernel that does not compile must not hide the other checks
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
            worst = float("nan")
        rows.append(row(name, "kernel vs plain", [worst], metric="difference", unit="",
                        mode="check", device=options.device))  # fmt: skip
    return rows


def of(section: Callable[[str, int], list[Row]]) -> Callable[[Options], list[Row]]:
    """A function of device and repeats as a section."""
    return lambda options: section(options.device, options.repeats)


SECTIONS: dict[str, Callable[[Options], list[Row]]] = {
    "checks": checks,
    "waits": of(gpu_steps.waits),
    "ceilings": of(ceilings),
    "ladder": of(gpu_steps.ladder),
    "methods": of(gpu_steps.methods),
    **{name: of(bench) for name, bench in BENCHES.items()},
    "graphs": of(gpu_steps.graphs),
}
"""In this order; the one that compiles longest is the last."""


class OutOfTime(BaseException):
    """Raised in whatever runs when the time is used up; no section catches it."""


def _stop(*_: object) -> None:
    raise OutOfTime


def main(options: Options) -> int:
    """Run the sections, write their rows, and return the exit code."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_suite: got no CUDA device, expected one; run it on a GPU machine", file=sys.stderr
        )
        return 2
    start, failed, rows = time.monotonic(), False, []
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, options.seconds)
    names = list(options.only or SECTIONS)
    for place, name in enumerate(names):
        print(f"== {name} ({time.monotonic() - start:.0f} s)", flush=True)
        try:
            new = SECTIONS[name](options)
        except OutOfTime:
            print(f"left out for want of time: {', '.join(names[place:])}", file=sys.stderr)
            break
        except Exception as error:  # rows of the other sections are worth having
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        failed |= any(r.metric == "difference" and r.median != r.median for r in new)
        show(new)
        rows += new
        write(rows, options.out)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
