"""A verdict on ten methods, and oracles: one command beside a process for each.

    cd benchmarks && python -m verdict.bench_verdict --out results/verdict_cpu.csv
    python -m verdict.bench_verdict --photos imagenette --epochs 1 --resume ../build/verdict \
        --out results/verdict_cpu.csv

On the digits; with `--photos` the verdict of ResNet-18 at 224 px alone, whose rows are added to the
file. With `--resume` the same command goes on behind the last command of letheon that ended.

Both ways start from one original and end in the same weights; a digest tells. By processor seconds
of whole processes, start-up included, which a neighbor moves less than the clock. The original and
the retrained model of the table are trained outside.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from end_to_end.journal import Journal, work_folder
from end_to_end.photographs import gather
from harness import Results, describe_cpu, revision, row

ROOT = Path(__file__).resolve().parents[2]
METHODS = (
    "finetune", "grad-ascent --lr 1e-4", "l1-sparse", "random-label", "salun random-label", "spkd",
    "neg-grad-plus", "ssd --alpha 2", "fisher", "bad-teacher",
)  # fmt: skip
ONE_SHOT = ("ssd", "fisher")
FORGET = ("--forget", "class:3,8")
ORACLES = 4


@dataclass(frozen=True)
class Options:
    """How long, and where the rows go."""

    epochs: int = 2
    """of each method that trains"""
    photos: Path | None = None
    """folder with train/CLASS/ and val/CLASS/ of JPEGs; default: the digits"""
    images: int = 8
    """photographs of each class to train on; half as many are held out"""
    out: Path | None = None
    """CSV file to write; printed only, if not given"""
    resume: Path | None = None
    """folder of images, models and what has been measured, which is kept; a call that was cut off
    goes on from there"""


def call(*words: object) -> float:
    """Processor seconds of one command of letheon, with all of its processes.

    It begins from nothing: what one that was cut off has left in its folder is removed.
    """
    shutil.rmtree(Path(str(words[words.index("--out") + 1])), ignore_errors=True)
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


@dataclass(frozen=True)
class Setting:
    """Images, network and lengths; every command gets the same."""

    name: str
    data: object
    model: tuple[object, ...]  # of train; default: the images' own
    recipe: tuple[object, ...]  # of original and retrained
    methods: tuple[object, ...]  # of each method that trains
    chance: tuple[str, ...] = ()  # says that an original which one epoch left at chance is meant

    def tails(self) -> dict[str, list[object]]:
        """Method -> what follows `letheon forget` and its shared options."""
        words = {text.split()[0]: text.split() for text in METHODS}
        return {m: [*w, *(() if m in ONE_SHOT else self.methods)] for m, w in words.items()}


def prepare(options: Options, folder: Path) -> Setting:
    """Make the setting that the options ask for."""
    epochs: tuple[object, ...] = ("--epochs", options.epochs)
    if options.photos is None:
        return Setting("digits", "digits", (), ("--epochs", 6, "--lr", 0.1), epochs)
    photos = folder / "photos"
    shutil.rmtree(photos, ignore_errors=True)  # of a call that was cut off
    source = gather(options.photos, photos, (options.images, options.images // 2, 0))
    batch: tuple[object, ...] = ("--batch-size", 16)
    return Setting(
        f"resnet18, 224 px, {source}, {options.images} a class",
        folder / "photos",
        ("--model", "resnet18"),
        ("--epochs", 1, "--lr", 0.1, *batch),
        (*epochs, *batch),
        ("--accept-chance",),
    )


def add(results: Results, name: str, x: str, one: float, each: float) -> None:
    """Rows of both ways, and how many times one command is faster."""
    for variant, seconds in (("one command", one), ("a process each", each)):
        results.add([row(name, variant, [seconds], metric="processor", unit="s", x=x,
                         mode="train", device="cpu")])  # fmt: skip
    results.add([row(name, "one command", [each / one], metric="ratio, processor",
                     unit="times", x=x, mode="train", device="cpu")])  # fmt: skip


def compare_verdicts(
    setting: Setting, epochs: int, folder: Path, results: Results, journal: Journal
) -> tuple[float, float]:
    """Measure the table of ten methods both ways; the seconds of original and retrained."""
    tails, data = setting.tails(), ("--data", setting.data)
    base = ("forget", *data, "--weights", folder / "original", *FORGET, *setting.chance)
    train = (*setting.model, *setting.recipe)
    original = measure(journal, "train", *data, *train, "--out", folder / "original")
    joint = [word for tail in tails.values() for word in ("+", *tail)][1:]
    one = measure(journal, *base, "--out", folder / "all", *joint)
    each = sum(
        measure(journal, *base, "--out", folder / method, *tail) for method, tail in tails.items()
    )
    retrained = retrain(setting, folder, 1, journal)
    table = measure(
        journal, "evaluate", *data,
        "--original", folder / "original", "--retrained", folder / "retrain-1",
        "--runs", *(folder / "all" / method for method in tails), "--out", folder / "table",
        *setting.chance,
    )  # fmt: skip
    x = f"{setting.name}, {len(tails)} methods, {epochs} epochs, table included"
    add(results, "verdict", x, one + table, each + table)
    differing = [m for m in tails if digest(folder / "all" / m) != digest(folder / m)]
    if differing:
        sys.exit(f"the two ways ended with other weights: {', '.join(differing)}")
    return original, retrained


def retrain(setting: Setting, folder: Path, seed: int, journal: Journal) -> float:
    """Seconds of a retrained model."""
    base = ("forget", "--data", setting.data, "--weights", folder / "original", *FORGET)
    out = folder / f"retrain-{seed}"
    words = ("--seed", seed, "--out", out, "retrain", *setting.recipe)
    return measure(journal, *base, *setting.chance, *words)


def measure(journal: Journal, *words: object) -> float:
    """As `call`, once: a command is known by the folder that it writes."""
    return journal.keep(Path(str(words[words.index("--out") + 1])).name, partial(call, *words))


def main(options: Options) -> None:
    """Measure both ways, one after the other; exit code 1 where the weights differ."""
    torch.set_num_threads(1)  # as `call` has it in the processes, for the rows to say so
    facts = {"epochs": options.epochs, "photos": str(options.photos), "images": options.images}
    with work_folder(options.resume) as folder:
        journal = Journal(folder, {**facts, "revision": revision(), "device": describe_cpu()})
        results = Results(options.out, options.photos is not None, once=journal.goes_on)
        setting = prepare(options, folder)
        original, retrained = compare_verdicts(setting, options.epochs, folder, results, journal)
        if options.photos is not None:
            return
        apart = original + retrained
        apart += sum(retrain(setting, folder, seed, journal) for seed in range(2, ORACLES + 1))
        together = measure(journal, "oracles", "--data", setting.data, *FORGET, "--count", ORACLES,
                           "--out", folder / "oracles", *setting.recipe)  # fmt: skip
        x = f"digits, {ORACLES} retrained models, 1 original, 6 epochs, outputs stored too"
        add(results, "oracles", x, together, apart)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
