"""Many retrains by one command: the ensemble of an audit, and different requests at 224 px.

    cd benchmarks && python -m many_models.bench_requests --out results/requests_cpu.csv

"ensemble" is `letheon oracles` on the digits: so many retrained models and as many originals, with
their stored outputs. "requests" are retrains of ResNet-18 at 224 px without one class each, by
`letheon forget --jobs` and by a process each, on the same photographs; a digest tells that both end
in the same weights. By the clock and by processor seconds of whole processes, start-up included.
Without `--photos` the requests are left out.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from harness import Results, row
from verdict.bench_verdict import call, digest


@dataclass(frozen=True)
class Options:
    """How much of it."""

    out: Path | None = None
    """CSV file to write; printed only, if not given"""
    photos: Path | None = None
    """a folder of class folders of JPEGs, as ImageNet's: train/CLASS/*.jpg and val or test"""
    count: int = 64
    """retrained models of the ensemble, and originals; 0 leaves it out"""
    epochs: int = 20
    """of the ensemble"""
    requests: int = 8
    per_class: int = 24
    """photographs of each class to train on"""


def time_command(*words: object) -> tuple[float, float]:
    """Seconds of a command by the clock and by the processor."""
    start = time.perf_counter()
    processor = call(*words)
    return time.perf_counter() - start, processor


def add(results: Results, name: str, variant: str, x: str, seconds: tuple[float, float]) -> None:
    """Rows of both clocks."""
    for metric, value in zip(("wall", "processor"), seconds, strict=True):
        results.add([row(name, variant, [value], metric=metric, unit="s", x=x, mode="train",
                         device="cpu")])  # fmt: skip


def ensemble(options: Options, folder: Path, results: Results) -> None:
    """`letheon oracles` whole."""
    seconds = time_command(
        "oracles", "--data", "digits", "--forget", "class:3,8", "--count", options.count,
        "--originals", options.count, "--out", folder / "oracles", "--epochs", options.epochs,
        "--lr", 0.1, "--schedule", "cosine",
    )  # fmt: skip
    x = f"digits, {options.count} + {options.count} models, {options.epochs} epochs, outputs stored"
    add(results, "ensemble", "one command", x, seconds)
    rate = 2 * options.count / seconds[1] * 3600
    results.add([row("ensemble", "one command", [rate], metric="rate, processor", unit="models/h",
                     x=x, mode="train", device="cpu")])  # fmt: skip


def requests(options: Options, photos: Path, folder: Path, results: Results) -> None:
    """Different requests together and apart."""
    some = folder / "photos"
    for path in sorted(photos.glob("*/*")):
        if path.is_dir():
            place = some / path.relative_to(photos)
            place.mkdir(parents=True)
            for file in sorted(path.iterdir())[: options.per_class]:
                shutil.copy(file, place)
    recipe = ("--epochs", 1, "--batch-size", 16, "--lr", 0.1)
    shared = ("--data", some, "--model", "resnet18")
    time_command("train", *shared, *recipe, "--out", folder / "original")
    base = ("forget", "--data", some, "--weights", folder / "original")
    jobs = folder / "jobs.txt"
    words = " ".join(map(str, ("retrain", *recipe)))
    jobs.write_text("".join(f"--forget class:{k} {words}\n" for k in range(options.requests)))
    together = time_command(*base, "--out", folder / "together", "--jobs", jobs)
    each = [
        time_command(
            *base, "--forget", f"class:{k}", "--out", folder / f"alone-{k}", "retrain", *recipe
        )
        for k in range(options.requests)
    ]
    x = f"resnet18, 224 px, {options.requests} requests, {options.per_class} photographs a class"
    apart = (sum(wall for wall, _ in each), sum(processor for _, processor in each))
    add(results, "requests", "one command", x, together)
    add(results, "requests", "a process each", x, apart)
    for clock, metric in enumerate(("ratio, wall", "ratio, processor")):
        ratio = apart[clock] / together[clock]
        results.add([row("requests", "one command", [ratio], metric=metric, unit="times", x=x,
                         mode="train", device="cpu")])  # fmt: skip
    for k in range(options.requests):
        if digest(folder / "together" / f"retrain-class{k}") != digest(folder / f"alone-{k}"):
            sys.exit(f"the two ways ended with other weights for class {k}")


def main(options: Options) -> None:
    """Measure what is asked for."""
    torch.set_num_threads(1)  # as `call` has it in the processes, for the rows to say so
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as name:
        if options.photos is not None:
            requests(options, options.photos.resolve(), Path(name), results)
        if options.count:
            ensemble(options, Path(name), results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
