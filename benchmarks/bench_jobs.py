"""Several runs of launch/forget.py fed from one pass over the data, against one process for each.

    python benchmarks/bench_jobs.py --images imagenette-224 --out benchmarks/results/jobs_cpu.csv

`--images` holds train/<class>/ and val/<class>/ of photographs; a part of them is taken. Both ways
start from the same untrained small network, read JPEGs by the plain loader with two
worker processes, and are timed as a user would: wall clock of whole processes, start-up included.
The two ways take turns. Ends with code 1 where the weights are not bitwise equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Row, row, show, write

from letheon.engine.checkpoints.model_file import save_model
from letheon.engine.models.classifier import build

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 2
RUNS = {
    "finetune": "finetune --lr 0.01",
    "l1-sparse": "l1-sparse --lr 0.01",
    "grad-ascent": "grad-ascent --lr 1e-4",
    "random-label": "random-label --lr 0.01",
    "spkd": "spkd --lr 1e-5",
}


def part_of(source: Path, folder: Path, each: int) -> int:
    """Links to the first `each` training images of every class, and to four held-out ones."""
    count = 0
    for split, most in (("train", each), ("val", 4)):
        for names in sorted((source / split).iterdir()):
            place = folder / split / names.name
            place.mkdir(parents=True)
            for file in sorted(names.iterdir())[:most]:
                (place / file.name).symlink_to(file.resolve())
                count += split == "train"
    return count


def forget(folder: Path, out: Path, methods: list[str]) -> float:
    """Seconds of one process."""
    command = [sys.executable, str(ROOT / "launch" / "forget.py"), "--data", str(folder / "data")]
    command += ["--weights", str(folder / "original"), "--forget", "class:0,1", "--overwrite"]
    command += ["--loader", "torch", "--workers", "2", "--device", "cpu", "--out", str(out)]
    begun = time.perf_counter()
    subprocess.run([*command, *methods], check=True, capture_output=True)
    return time.perf_counter() - begun


def digest(run: Path) -> str:
    """Of the weights that a run ended with."""
    return str(json.loads((run / "run.json").read_text())["weights"])


def main() -> None:
    """Measure, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="input pixels")
    parser.add_argument("--each", type=int, default=50, help="training images of each class")
    options = parser.parse_args()
    rows = []
    equal = True
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            found, same = measured(options, Path(name), size)
        rows += found
        equal = equal and same
    show(rows)
    write(rows, options.out)
    if not equal:
        sys.exit("the two ways ended with other weights")


def measured(options: argparse.Namespace, folder: Path, size: int) -> tuple[list[Row], bool]:
    """Rows for inputs of `size` pixels, and whether both ways ended with the same weights."""
    tails = {name: [*words.split(), "--epochs", str(EPOCHS)] for name, words in RUNS.items()}
    joint = [word for tail in tails.values() for word in ("+", *tail)][1:]
    separate: list[float] = []
    together: list[float] = []
    count = part_of(options.images, folder / "data", options.each)
    classes = len(list((folder / "data" / "train").iterdir()))
    preset = dataclasses.replace(build("resnet18", 2).preset, size=size, resize_to=size)
    (folder / "original").mkdir()
    save_model(folder / "original", build("small", classes, 0, preset))
    for _ in range(options.repeats):
        separate.append(sum(forget(folder, folder / run, tails[run]) for run in RUNS))
        together.append(forget(folder, folder / "all", joint))
    same = all(digest(folder / run) == digest(folder / "all" / run) for run in RUNS)
    x = f"{len(RUNS)} runs, {EPOCHS} epochs, {count} images, {size} px"
    ratios = [one / other for one, other in zip(separate, together, strict=True)]
    rows = [
        row("jobs", variant, values, metric=metric, unit=unit, mode="train", x=x, device="cpu")
        for variant, values, metric, unit in (
            ("a process each", separate, "time", "s"),
            ("one pass", together, "time", "s"),
            ("one pass", ratios, "ratio over a process each", "x"),
        )
    ]
    return rows, same


if __name__ == "__main__":
    main()
