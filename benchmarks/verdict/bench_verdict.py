"""A verdict on ten methods, and oracles: one command beside a process for each, on the digits.

    cd benchmarks && python -m verdict.bench_verdict --out results/verdict_cpu.csv

Both ways start from one original and end in the same weights; a digest tells. By processor seconds
of whole processes, start-up included, which a neighbor moves less than the clock. The original and
the retrained model of the table are trained outside.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from harness import Results, row

ROOT = Path(__file__).resolve().parents[2]
METHODS = (
    "finetune", "grad-ascent --lr 1e-4", "l1-sparse", "random-label", "salun random-label", "spkd",
    "neg-grad-plus", "ssd --alpha 2", "fisher", "bad-teacher",
)  # fmt: skip
ONE_SHOT = ("ssd", "fisher")
ORACLES = 4


@dataclass(frozen=True)
class Options:
    """How long, and where the rows go."""

    epochs: int = 2
    """of each method that trains"""
    out: Path | None = None
    """CSV file to write; printed only, if not given"""


def call(*words: object) -> float:
    """Processor seconds of one command of letheon, with all of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    verb, *rest = map(str, words)
    command = [sys.executable, "-m", "letheon.launch.main", verb, "--device", "cpu", *rest]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    if ended.returncode:
        sys.exit(f"{' '.join(map(str, words))}: {ended.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def digest(run: Path) -> str:
    """The digest of the weights that a run ended with."""
    return str(json.loads((run / "run.json").read_text())["weights"])


def main(options: Options) -> None:
    """Measure both ways of both, one after the other; exit code 1 where the weights differ."""
    results = Results(options.out)
    tails = {
        text.split()[0]: [*text.split(), *(() if text.split()[0] in ONE_SHOT else
                                           ("--epochs", options.epochs))]
        for text in METHODS
    }  # fmt: skip
    train = ("--epochs", 6, "--lr", 0.1)

    def add(name: str, x: str, one: float, each: float) -> None:
        for variant, seconds in (("one command", one), ("a process each", each)):
            results.add([row(name, variant, [seconds], metric="processor", unit="s", x=x,
                             mode="train", device="cpu")])  # fmt: skip
        results.add([row(name, "one command", [each / one], metric="ratio, processor",
                         unit="times", x=x, mode="train", device="cpu")])  # fmt: skip

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = call("train", "--data", "digits", *train, "--out", folder / "original")
        base = ("forget", "--weights", folder / "original", "--forget", "class:3,8")
        joint = [word for tail in tails.values() for word in ("+", *tail)][1:]
        one = call(*base, "--out", folder / "all", *joint)
        each = sum(call(*base, "--out", folder / method, *tail) for method, tail in tails.items())

        def retrain(seed: int) -> float:
            return call(*base, "--seed", seed, "--out", folder / f"retrain-{seed}", "retrain",
                        *train)  # fmt: skip

        retrains = [retrain(1)]
        table = call(
            "evaluate", "--original", folder / "original", "--retrained", folder / "retrain-1",
            "--runs", *(folder / "all" / method for method in tails), "--out", folder / "table",
        )  # fmt: skip
        x = f"digits, {len(tails)} methods, {options.epochs} epochs, table included"
        add("verdict", x, one + table, each + table)
        differing = [m for m in tails if digest(folder / "all" / m) != digest(folder / m)]
        if differing:
            sys.exit(f"the two ways ended with other weights: {', '.join(differing)}")
        retrains += [retrain(seed) for seed in range(2, ORACLES + 1)]
        together = call("oracles", "--data", "digits", "--forget", "class:3,8", "--count", ORACLES,
                        "--out", folder / "oracles", *train)  # fmt: skip
        x = f"digits, {ORACLES} retrained models, 1 original, {train[1]} epochs, outputs stored too"
        add("oracles", x, together, original + sum(retrains))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
