"""The first table of docs/benchmarks.md: Letheon beside what a user would do today.

`plot.py` writes it. Every number of ours is read from a file of `benchmarks/results/`; a number of
others that was not measured here is named as cited, and no ratio is taken of it.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

UNKNOWN = "not measured"
JOB = re.compile(r"resnet18, 224 px, [^,]*imagenette[^,]*?(?:, (\d+) a class)?: all, one pass")
ONCE = "6"  # photographs of each class at scale 1


class Numbers:
    """Medians of the committed results."""

    def __init__(self, results: Path) -> None:
        """Take the folder."""
        self.results = results

    def find(self, file: str, variant: str, metric: str, x: str = "", name: str = "") -> float:
        """The median of the first row that matches, whose x contains `x`; NaN without one."""
        if not (self.results / file).is_file():
            return float("nan")
        with (self.results / file).open(newline="") as rows:
            for line in csv.DictReader(rows):
                same = line["variant"] == variant and line["metric"] == metric
                if same and x in line["x"] and name in ("", line["name"]):
                    return float(line["median"])
        return float("nan")


def show(text: str, *numbers: float) -> str:
    """The text with the numbers, or that they were not measured."""
    if any(number != number for number in numbers):
        return UNKNOWN
    return text.format(*numbers)


def whole_jobs(results: Path) -> list[tuple[str, str, str]]:
    """Where the end-to-end rows at 224 px are: file, x, and images of each class in training.

    Those of `bench_end_to_end --scale` name their number, in a file of their own or in the same.
    """
    scaled = sorted(path.name for path in results.glob("end_to_end_cpu_x*.csv"))
    names = ("end_to_end_cpu.csv", *scaled)
    found: dict[tuple[str, str, str], None] = {}
    for name in names:
        path = results / name
        for line in csv.DictReader(path.open(newline="")) if path.is_file() else ():
            match = JOB.fullmatch(line["x"])
            if match and (line["variant"], line["metric"]) == ("ours fp32", "wall"):
                found[name, line["x"], match[1] or ONCE] = None
    return [*found] or [(names[0], "resnet18, 224 px", ONCE)]


def opening(results: Path) -> str:
    """The table in Markdown."""
    find = Numbers(results).find

    def pair(
        what: str, today: str, ours: str, file: str, variants: tuple[str, str], metric: str, x: str
    ) -> tuple[str, str, str, str]:
        """One row whose both sides were measured in one run."""
        theirs, mine = (find(file, variant, metric, x) for variant in variants)
        larger, smaller = (mine, theirs) if metric == "rate" else (theirs, mine)
        return (
            what, f"{show(today, theirs)}", f"{show(ours, mine)}", show("{:.1f}", larger / smaller)
        )  # fmt: skip

    speed, wide = (find("retrain_gpu.csv", each, "wall") for each in ("speed", "wide"))
    right = [100 * find("retrain_gpu.csv", each, "accuracy") for each in ("speed", "wide")]
    rows = [
        pair(
            "exact retrain, 1,800 images of 32 px, one core",
            "plain schedule: {:.0f} s of processor time",
            "fast recipe: {:.0f} s, no less accurate",
            "retrain_cpu.csv", ("plain", "fast"), "processor", "small",
        ),
        (
            "exact retrain, CIFAR-10, one GPU",
            "cited: ResNet-18, 154.6 min (Jeon et al. 2026); ResNet-18 to 96 %, 7 min on an A100 "
            "(airbench README)",
            show("{:.1f} s to {:.1f} %, {:.1f} s to {:.1f} %, on an H100 and fewer images "
                 "([retrain.md](retrain.md))", speed, right[0], wide, right[1]),
            "-",
        ),
        pair(
            "verdict on ten methods, digits, one core",
            "a process for each: {:.0f} s of processor time",
            "one command, then the table: {:.0f} s",
            "verdict_cpu.csv", ("a process each", "one command"), "processor", "digits, 10 methods",
        ),
        *(
            pair(
                "verdict on four methods, ResNet-18 at 224 px, "
                f"{count} photographs a class, two cores",
                "the field's scripts: {:.0f} s",
                "one command, then the table: {:.0f} s",
                file, ("baseline", "ours fp32"), "wall", x,
            )
            for file, x, count in whole_jobs(results)
        ),
        pair(
            "verdict on ten methods, ResNet-18 at 224 px, one core",
            "a process for each: {:.0f} s of processor time",
            "one command, then the table: {:.0f} s",
            "verdict_cpu.csv", ("a process each", "one command"), "processor", "224 px",
        ),
        ("verdict on ten methods on a GPU", UNKNOWN, UNKNOWN, "-"),
    ]  # fmt: skip
    count = 5  # models of the rows `oracles`
    each, one = (
        3600 * count / find("verdict_cpu.csv", variant, "processor", "retrained models")
        for variant in ("a process each", "one command")
    )
    loader = ("torchvision DataLoader", "letheon beton")
    step = ("field, bf16 NCHW", "our step, bf16, compiled")
    rows += [
        (
            "oracles an hour of processor time, digits, 6 epochs",
            show("a process for each: {:.0f}", each),
            show("`letheon oracles`, outputs stored too: {:.0f}", one),
            show("{:.1f}", one / each) if one == one and each == each else "-",
        ),
        ("oracles an hour, CIFAR-10, one GPU", UNKNOWN, UNKNOWN, "-"),
        pair(
            "images/s, JPEGs to training images of 224 px, one core", "torchvision DataLoader: "
            "{:.0f}", "{:.0f}", "loaders_cpu.csv", loader, "rate", "224",
        ),
        pair(
            "images/s, training step of ResNet-50 at 224 px, one H100", "bf16, NCHW, eager: {:.0f}",
            "bf16, compiled: {:.0f}", "gpu.csv", step, "rate", "resnet50 224px",
        ),
    ]  # fmt: skip
    text = ["| what | today | Letheon | times |", "|---|---|---|---:|"]
    return "\n".join([*text, *(f"| {' | '.join(row)} |" for row in rows)])
