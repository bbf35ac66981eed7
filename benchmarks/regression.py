"""Compare a new results file with the committed one, by ratios, not by seconds. Advisory.

    python benchmarks/regression.py new.csv benchmarks/results/end_to_end_cpu.csv

Seconds differ between machines and hours; how many times faster one variant is than another in the
same run differs less. Two kinds of number are compared: rows that are ratios already, and for
times each variant against the first one of its group. The exit code is 0 whatever is found, 2 where
a file cannot be read; `--strict` makes it 1 where a ratio fell by more than `--margin`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

Key = tuple[str, ...]
Ratios = dict[Key, float]


@dataclass(frozen=True)
class Options:
    """The files, and how much less is worth a word."""

    new: tyro.conf.Positional[Path]
    committed: tyro.conf.Positional[Path]
    margin: float = 0.15
    """Share of a ratio that may be lost."""
    strict: bool = False


def ratios(rows: Iterable[dict[str, str]]) -> Ratios:
    """Speed against the same run: by name, x, mode, metric and variant; higher is better."""
    found: Ratios = {}
    firsts: dict[Key, float] = {}
    for line in rows:
        value = float(line["median"])
        group = (line["name"], line["x"], line["mode"], line["metric"])
        if line["metric"].startswith("ratio"):
            found[(*group, line["variant"])] = value
        elif line["metric"] in ("time", "wall"):
            first = firsts.setdefault(group, value)
            if first is not value and value > 0:
                found[(*group, line["variant"])] = first / value
    return found


def lost(new: Ratios, committed: Ratios, margin: float) -> list[tuple[Key, float, float]]:
    """(key, committed, new) of the ratios that fell by more than `margin`, the worst first."""
    pairs = [(key, committed[key], new[key]) for key in committed if key in new]
    fallen = [(key, old, now) for key, old, now in pairs if now < (1 - margin) * old]
    return sorted(fallen, key=lambda entry: entry[2] / entry[1])


def read(path: Path) -> Ratios:
    """The ratios of a results file."""
    with path.open(newline="") as file:
        return ratios(csv.DictReader(file))


def main(options: Options) -> int:
    """Print what fell; the exit code."""
    try:
        new, committed = read(options.new), read(options.committed)
    except (OSError, KeyError, ValueError) as error:
        print(f"regression: got a file that is no results file ({error!r})", file=sys.stderr)
        return 2
    fallen = lost(new, committed, options.margin)
    for key, old, now in fallen:
        print(f"{', '.join(filter(None, key))}: {old:.3g} times before, {now:.3g} now")
    shared = len(new.keys() & committed.keys())
    print(f"{len(fallen)} of {shared} ratios fell by more than {options.margin:.0%}")
    return int(options.strict and bool(fallen))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
