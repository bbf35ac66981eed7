"""Everything that needs a GPU, in one call: each kernel checked against its plain form, then timed.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu.csv

Sections run in order, rows are written as each ends, and a section is left out, by name, when the
time is used up. The exit code is 0 if all checks passed, 1 if one failed, 2 without a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from bench_kernels import BENCHES
from gpu_checks import CHECKS
from harness import Row, compare, row, show, write


@dataclass(frozen=True)
class Options:
    """What to run, and for how long."""

    out: Path = Path("benchmarks/results/gpu.csv")
    """CSV file, written anew"""
    seconds: float = 520
    """no section begins after this"""
    repeats: int = 50
    """timed calls of each variant"""
    only: tuple[str, ...] = ()
    """sections to run; all, if not given"""


def checks(options: Options) -> list[Row]:
    """One row per check: its largest difference, or NaN where it failed."""
    rows = []
    for name, check in CHECKS.items():
        try:
            worst = check("cuda")
        except Exception as error:  # a kernel that does not compile must not hide the other checks
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
            worst = float("nan")
        rows.append(
            row(name, "kernel vs plain", [worst], metric="difference", unit="", mode="check")
        )
    return rows


def ceilings(options: Options) -> list[Row]:
    """What the card reaches: copy of 1 GB, and a large bf16 product."""
    big = torch.empty(1 << 28, device="cuda")
    other = torch.empty_like(big)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    variants = {"copy, 2.15 GB moved": lambda: other.copy_(big), "bf16 8192^3": lambda: a @ a}
    return compare("ceiling", variants, options.repeats, device="cuda")


def kernels(name: str) -> Callable[[Options], list[Row]]:
    """A bench of bench_kernels.py as a section."""
    return lambda options: BENCHES[name]("cuda", options.repeats)


SECTIONS: dict[str, Callable[[Options], list[Row]]] = {
    "checks": checks,
    "ceilings": ceilings,
    **{name: kernels(name) for name in BENCHES},
}


def main(options: Options) -> int:
    """Run the sections, write their rows, and return the exit code."""
    if not torch.cuda.is_available():
        print(
            "gpu_suite: got no CUDA device, expected one; run it on a GPU machine", file=sys.stderr
        )
        return 2
    start, failed, rows = time.monotonic(), False, []
    for name in options.only or SECTIONS:
        used = time.monotonic() - start
        if used > options.seconds:
            print(f"left out for want of time: {name}", file=sys.stderr)
            continue
        print(f"== {name} ({used:.0f} s)", flush=True)
        try:
            new = SECTIONS[name](options)
        except Exception as error:  # rows of the other sections are worth having
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        failed |= any(r.metric == "difference" and r.median != r.median for r in new)
        show(new)
        rows += new
        write(rows, options.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
