"""From a folder of JPEGs to the final table: ours and the baseline, the same request and epochs.

    python benchmarks/bench_end_to_end.py                       # drawn images
    python benchmarks/bench_end_to_end.py --photos imagenette   # train/<class>/, val/<class>/
    python benchmarks/bench_end_to_end.py --photos imagenette --scale 10 --resume build/end
    python benchmarks/bench_end_to_end.py --device cuda --ranks 8 --out results/end_to_end_gpu.csv

FT, GA, SalUn and SPKD, then one table of the original, the retrained and the four. Each is a
process of its own, the sides in turn; a setting is repeated as often as `--repeats` and `--minutes`
allow. Each process is a row ("process") as soon as it ends; the summary follows. With `--resume`
the same command goes on behind the last process that ended. The exit code is 1 where ours in
float32 differs from the baseline beyond tolerance.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from baseline.training import Name
from end_to_end.journal import Journal, work_folder
from end_to_end.photographs import fit_counts, gather
from end_to_end.sides import METHODS, TOGETHER, Setting, Side, Spent, starting_models
from harness import PARTS, Results, Row, describe_cpu, revision, row
from plot import read, table
from safetensors.torch import load_file

from letheon.loaders.preset import Preset

HALF = (0.5, 0.5, 0.5)
ONE_PASS = "all, one pass"
RATES = {"ft": 1e-3, "ga": 1e-6, "salun": 1e-3, "spkd": 1e-5}
SETTINGS = {
    "resnet18, 224 px": Setting(
        "resnet18, 224 px", "resnet18", Preset(224), (6, 3, 3), 2, 16, RATES, None,
        once=("ft", "ga", TOGETHER),
    ),
    "small, 64 px": Setting(
        "small, 64 px", "small", Preset(64, HALF, HALF, "short", 64, augment="pad-crop-flip"),
        (120, 30, 30), 4, 64, RATES, 64, once=("ft", "ga", TOGETHER),
    ),
}  # fmt: skip
TOLERANCE = {
    "update": 0.02,  # |ours - baseline| / |baseline - start| over all weights
    "FA": 0.03, "RA": 0.03, "TFA": 0.05, "TRA": 0.05,
    "knn": 0.05,
    "cka_retrained_forget": 0.005, "cka_retrained_retain": 0.005,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to run, and where."""

    photos: Path | None = None
    """Folder with train/<class>/ and val/<class>/ of JPEGs; default: images drawn here."""
    out: Path = Path("benchmarks/results/end_to_end_cpu.csv")
    settings: tuple[str, ...] = tuple(SETTINGS)
    methods: tuple[Name, ...] = METHODS
    repeats: int = 3
    minutes: float = 7
    """Of a setting: no repeat begins that would go beyond, if it took as long as the last."""
    every: bool = False
    """Repeat FT, GA and the one command too, which else run once, to save time."""
    scale: float = 1
    """Multiplies the number of images, up to what the photographs allow. Rows of another scale than
    1 name the images of each class in training."""
    device: str = "cpu"
    ranks: int = 1
    """Processes of ours, by torchrun; the baseline knows one device."""
    bf16: bool = True
    """Ours in bfloat16 too; its differences are shown, not judged."""
    resume: Path | None = None
    """Folder of images, models and what has been measured, which is kept; a call that was cut off
    goes on from there, and adds its rows to those of `out`."""


def main(options: Options) -> int:
    """Run all, write the rows, print the ratios; the exit code."""
    with work_folder(options.resume) as folder:
        facts = asdict(options) | {"resume": "", "revision": revision(), "device": describe_cpu()}
        journal = Journal(folder, {key: str(value) for key, value in facts.items()})
        return compare(options, folder, journal)


def compare(options: Options, folder: Path, journal: Journal) -> int:
    """As `main`, in a folder to work in."""
    results = Results(options.out, append=journal.goes_on, once=journal.goes_on)
    far: list[str] = []
    for number, name in enumerate(options.settings):
        setting = SETTINGS[name]
        once = () if options.every else setting.once
        counts = fit_counts(options.photos, setting.counts, options.scale)
        fewer = counts != (goal := fit_counts(None, setting.counts, options.scale))
        text = f"{name}: train, val and downstream of {counts} images a class"
        print(f"{text}; the photographs are too few for {goal}" if fewer else text, flush=True)
        setting = replace(setting, counts=counts, once=once)
        place = folder / f"setting-{number}"
        far += journal.keep(
            f"setting {name}", partial(one_setting, setting, options, place, results, journal)
        )
        shutil.rmtree(
            place, ignore_errors=True
        )  # its images and models; what was measured is in the journal
    print(f"\n{table(read(options.out))}")
    print("\n".join(f"beyond tolerance: {text}" for text in far))
    return int(bool(far))


def one_setting(
    setting: Setting, options: Options, root: Path, results: Results, journal: Journal
) -> list[str]:
    """Run all sides in one setting; returns what differs beyond tolerance."""
    start = f"start {setting.name}"
    if start not in journal:
        shutil.rmtree(root, ignore_errors=True)
        gather(options.photos, root / "images", setting.counts)
    source = "drawn" if options.photos is None else options.photos.name
    name = f"{setting.name}, {source}"
    if setting.counts != SETTINGS[setting.name].counts:
        name += f", {setting.counts[0]} a class"
    setting = replace(setting, name=name)
    journal.keep(start, partial(starting_models, setting, root))
    sides = [Side("baseline", setting, root, options.device)]
    for dtype in ("fp32", "bf16") if options.bf16 else ("fp32",):
        sides.append(
            Side(f"ours {dtype}", setting, root, options.device, dtype, options.ranks)
        )  # fmt: skip
    spent: dict[tuple[str, str], list[Spent]] = {}
    begun, earlier = time.perf_counter(), 0.0  # seconds of processes that an earlier call ran
    for repeat in range(options.repeats):
        now = [m for m in (*options.methods, TOGETHER) if not repeat or m not in setting.once]
        last = (runs[-1].wall for (_, step), runs in spent.items() if step not in setting.once)
        if repeat and time.perf_counter() - begun + earlier + sum(last) > 60 * options.minutes:
            break
        for step in ("prepare", *now, "evaluate"):
            for side in sides if repeat % 2 == 0 else reversed(sides):
                key = f"{setting.name}: {step}, {side.name}, repeat {repeat}"
                known = key in journal
                done = journal.keep(key, partial(_step, side, step, options.methods))
                if done is None:
                    continue
                spent.setdefault((side.name, step), []).append(Spent(*done))
                earlier += done[0] if known else 0.0
                x = f"{setting.name}: {step}"
                results.add([_row(side.name, [done[0]], "process", "s", x, options.device)])
    far = []
    names = [side.name for side in sides]
    results.add(timings(setting, names, spent, options.device, options.methods))
    for side in sides[1:]:
        new = results.add(differences(side, sides[0], options.device, options.methods))
        if side.name == "ours fp32":
            over = [r for r in new if not r.median <= TOLERANCE[r.mode]]  # NaN is over
            far += [f"{r.x}, {r.mode}: {r.median} over {TOLERANCE[r.mode]}" for r in over]
    return far


def _step(side: Side, step: str, methods: Sequence[str]) -> list[Any] | None:
    """What one process took, as JSON keeps it; from nothing, whatever one cut off has left."""
    folder = {"prepare": "prepared", "evaluate": "table"}.get(step, step)
    shutil.rmtree(side.place / folder, ignore_errors=True)
    if step == "prepare":
        done = side.prepare()
    elif step == TOGETHER:
        done = side.together(methods)
    else:
        done = side.evaluate(methods) if step == "evaluate" else side.forget(step)
    return None if done is None else [done.wall, done.cpu, done.parts]


def timings(
    setting: Setting,
    sides: Sequence[str],
    spent: dict[tuple[str, str], list[Spent]],
    device: str,
    methods: Sequence[str] = METHODS,
) -> list[Row]:
    """Rows of seconds and ratios, by method and for the whole job.

    A method's time is its own run, all of the preparation, and its share of the table, which is
    one model of `2 + len(methods)`.
    "ratio" is by wall clock against the baseline as published; "ratio without validation" leaves
    out what the baseline measures between epochs; "ratio, processor" is by processor time, which a
    neighbour's load moves less.
    """
    rows: list[Row] = []
    totals: dict[tuple[str, str], tuple[list[float], list[float], list[float]]] = {}
    for side in sides:
        for step, shares in _jobs(methods).items():
            if step == ONE_PASS and (side, TOGETHER) not in spent:
                shares = _jobs(methods)["all"]  # the baseline: one process after the other
            runs = [(spent[side, s], share) for s, share in shares.items() if (side, s) in spent]
            weights = [share for _, share in runs]
            repeats = zip(*(times for times, _ in runs), strict=False)  # some run once
            sums = [_sum(repeat, weights) for repeat in repeats]
            x = f"{setting.name}: {step}"
            walls, cpus = [s.wall for s in sums], [s.cpu for s in sums]
            bare = [s.wall - s.parts.get("validation", 0.0) for s in sums]
            totals[side, step] = walls, cpus, bare
            for metric, values in (("wall", walls), ("processor", cpus)):
                rows.append(_row(side, values, metric, "s", x, device))
            for part in PARTS:
                values = [s.parts.get(part, 0.0) for s in sums]
                rows.append(_row(side, values, f"part {part}", "s", x, device))
            if side != sides[0]:
                baseline = totals[sides[0], step]
                for metric, above, below in (
                    ("ratio", baseline[0], walls),
                    ("ratio without validation", baseline[2], bare),
                    ("ratio, processor", baseline[1], cpus),
                ):
                    # A job with a step that runs once has as many repeats as that step.
                    values = [a / b for a, b in zip(above, below, strict=False)]
                    rows.append(_row(side, values, metric, "times", x, device))
    return rows


def _jobs(methods: Sequence[str] = METHODS) -> dict[str, dict[str, float]]:
    """What each line of the table is made of: process -> share of it."""
    models = 2 + len(methods)
    jobs = {m: {"prepare": 1.0, m: 1.0, "evaluate": 1 / models} for m in methods}
    whole = {"prepare": 1.0, **dict.fromkeys(methods, 1.0), "evaluate": 1.0}
    once = {"prepare": 1.0, TOGETHER: 1.0, "evaluate": 1.0}
    return {**jobs, "evaluation": {"evaluate": 1.0}, "all": whole, ONE_PASS: once}


def _sum(run: Sequence[Spent], weights: Sequence[float]) -> Spent:
    pairs = list(zip(run, weights, strict=True))
    parts = {p: sum(w * s.parts.get(p, 0.0) for s, w in pairs) for p in PARTS}
    wall, cpu = (sum(w * getattr(s, k) for s, w in pairs) for k in ("wall", "cpu"))
    return Spent(wall, cpu, parts)


def _row(
    side: str, values: Sequence[float], metric: str, unit: str, x: str, device: str, mode: str = ""
) -> Row:  # fmt: skip
    return row("end_to_end", side, values, metric=metric, unit=unit, mode=mode, x=x, device=device)


def differences(
    side: Side, baseline: Side, device: str, methods: Sequence[str] = METHODS
) -> list[Row]:
    """How far the results of `side` are from the baseline's: weights by method, the table's rows.

    `mode` of a row says what is compared; NaN where one of the two is missing.
    """
    rows = []
    start = load_file(side.root / "original.safetensors")
    ours, theirs = side.rows(), baseline.rows()
    for name in ("original", "retrained", *methods):
        x = f"{side.setting.name}: {name}"
        if name in methods:
            left, right = (
                load_file(s.place / name / "weights.safetensors") for s in (side, baseline)
            )
            gap = update_gap(start, left, right)
            rows.append(_row(side.name, [gap], "difference", "", x, device, "update"))
        for metric in TOLERANCE:
            if metric in theirs[name]:
                gap = abs(float(ours[name][metric]) - theirs[name][metric])
                rows.append(_row(side.name, [gap], "difference", "", x, device, metric))
    return rows


def update_gap(
    start: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], baseline: dict[str, torch.Tensor]
) -> float:
    """|ours - baseline| / |baseline - start| over all floating point weights and statistics."""
    keys = [k for k, v in start.items() if v.is_floating_point()]
    apart = sum(float((ours[k] - baseline[k]).double().square().sum()) for k in keys)
    moved = sum(float((baseline[k] - start[k]).double().square().sum()) for k in keys)
    return float((apart / moved) ** 0.5)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
