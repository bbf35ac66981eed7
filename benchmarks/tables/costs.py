r"""Measure what each method of a jobs file costs alone, in epochs of fine-tuning.

    cd benchmarks
    OMP_NUM_THREADS=1 python -m tables.costs --jobs FOLDER/class.jobs --data FOLDER/data \
        --weights FOLDER/oracles/original-seed1 --forget class:truck --runs FOLDER/alone --out X.csv

One process runs each line by itself, one after another. Its processor time, less that of `no-op`,
which opens the images and saves the weights alone, is divided by that of an epoch of fine-tuning:
the mean of the nearest before and the nearest after it, so that a machine that other work slows
down slows both. A row has the medians of several rounds of all
methods, and the ratio's lowest and highest.
"""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import tyro

from letheon import durable
from letheon.engine.distributed import Ranks, join_ranks
from letheon.launch.forget import Settings, main, read

EVERY = 4
"""Methods between two epochs of fine-tuning."""
REFERENCE = ("finetune", "--epochs", "1", "--batch-size", "64")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    jobs: Path
    """File with a method a line, as `letheon forget --jobs` reads it."""
    data: Path
    weights: Path
    forget: str
    runs: Path
    """Folder for the runs; what is in it is replaced."""
    out: Path
    """CSV to write."""
    dtype: str = "bf16"
    seed: int = 1
    repeats: int = 3
    """Rounds of all methods."""


def processor_seconds(settings: Settings, ranks: Ranks) -> float:
    """Seconds of the processor, all threads, that one run takes from its opened images on."""
    start = time.process_time()
    main(replace(settings, overwrite=True), ranks)
    return time.process_time() - start


def measure(options: Options) -> list[dict[str, str]]:
    """Run every method, and fine-tuning before, between and after them; a row each."""
    common = [
        "--data", str(options.data), "--weights", str(options.weights), "--dtype", options.dtype,
        "--seed", str(options.seed), "--forget", options.forget,
    ]  # fmt: skip

    def one(out: str, *words: str) -> Settings:
        (settings,) = read([*common, "--out", str(options.runs / out), *words])
        return settings

    lines = options.jobs.read_text(encoding="utf-8").splitlines()
    methods = [one(f"{number}", *line.split()) for number, line in enumerate(lines) if line]
    reference, idle = one("reference", *REFERENCE), one("idle", "no-op")
    methods = [replace(m, out=options.runs / m.method.name) for m in methods]
    rounds: list[list[tuple[float, float]]] = []  # by round and method: seconds, those of an epoch
    with join_ranks("cpu") as ranks:
        main(replace(reference, overwrite=True), ranks)  # imports, and the images' first reading
        for _ in range(options.repeats):
            nothing = fmean(processor_seconds(idle, ranks) for _ in range(EVERY))
            seconds, epochs = [], []
            for number, settings in enumerate(methods):
                if number % EVERY == 0:
                    epochs.append(processor_seconds(reference, ranks) - nothing)
                seconds.append(processor_seconds(settings, ranks) - nothing)
            epochs.append(processor_seconds(reference, ranks) - nothing)
            near = [fmean(epochs[n // EVERY : n // EVERY + 2]) for n in range(len(methods))]
            rounds.append([*zip(seconds, near, strict=True)])
    rows = []
    for number, settings in enumerate(methods):
        spent, epoch = zip(*(one[number] for one in rounds), strict=True)
        ratios = [one / other for one, other in zip(spent, epoch, strict=True)]
        numbers = {
            "processor_seconds": median(spent), "epoch_seconds": median(epoch),
            "epochs_of_finetune": median(ratios), "lowest": min(ratios), "highest": max(ratios),
        }  # fmt: skip
        named = {name: f"{value:.3f}" for name, value in numbers.items()}
        rows.append({"name": settings.method.name, **named})
    return rows


if __name__ == "__main__":
    options = tyro.cli(Options)
    measured = measure(options)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(measured[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(measured)
    durable.write(options.out, text.getvalue())
