"""What bfloat16 costs in accuracy: the same trainings in float32 and in bfloat16, seed by seed.

    python benchmarks/bench_dtype.py --photos imagenette --out benchmarks/results/dtype_cpu.csv

For each seed one original is trained in float32; from it the network is retrained, fine-tuned, and
made to forget by SalUn and SPKD, once in each format, with the same order, crops and drawn labels.
Every model is then measured in float32, so that only the training differs. Rows of `difference` are
bfloat16 less float32, paired by seed. The exit code is 1 where bfloat16 loses more than a point of
TRA on average in any method. Nothing is timed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
import tyro
from harness import Row, row, show, write

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.eval.inference.passes import sweep
from letheon.loaders.batch import Loader, Reader
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.factory import make_loader
from letheon.loaders.open import open_data
from letheon.loaders.preset import Preset
from letheon.methods.finetune import Finetune
from letheon.methods.random_label import RandomLabel
from letheon.methods.retrain import Retrain
from letheon.methods.salun import SalUn
from letheon.methods.spkd import Spkd
from letheon.methods.train import Train

HALF = (0.5, 0.5, 0.5)
FORMATS = ("fp32", "bf16")
METRICS = ("FA", "RA", "TFA", "TRA")
POINT = 0.01


@dataclass(frozen=True)
class Options:
    """On what, and how long."""

    photos: Path
    """Folder with train/<class>/ and val/<class>/ of images."""
    out: Path = Path("benchmarks/results/dtype_cpu.csv")
    model: str = "resnet18"
    size: int = 64
    seeds: tuple[int, ...] = (1, 2, 3)
    epochs: int = 6
    """Of the original and of retraining."""
    forget_epochs: int = 1
    """Of the others."""
    batch_size: int = 64
    forget: tuple[int, ...] = (0, 3)
    device: str = "cpu"
    workers: int = 1


def methods(options: Options) -> dict[str, Method]:
    """What is trained from the original."""
    long = Recipe(options.epochs, lr=0.05, batch_size=options.batch_size, schedule="cosine")
    short = replace(long, epochs=options.forget_epochs, lr=0.01, schedule="constant")
    return {
        "retrain": Retrain(long),
        "finetune": Finetune(short),
        "salun": SalUn(RandomLabel(short), density=0.5),
        "spkd": Spkd(replace(short, lr=1e-5)),  # the ascent overflows at 1e-3
    }


@dataclass(frozen=True)
class Bench:
    """The images, and how a network is trained and measured on them."""

    data: Data
    options: Options

    def loader(self, held_out: bool, seed: int) -> Loader:
        """The training or the held-out images, decoded and cropped anew at each pass."""
        images = self.data.test if held_out else self.data.train
        options = self.options
        preset = Preset(options.size, HALF, HALF, "short", options.size, augment="pad-crop-flip")
        forget = np.isin(images.labels, options.forget)
        reader = Reader(seed, workers=options.workers, device=options.device)
        return make_loader("auto", images, forget, preset, options.batch_size, reader)

    def trained(self, method: Method, start: Classifier, dtype: str, seed: int) -> Classifier:
        """A copy of `start` after the method's run in `dtype`."""
        device = torch.device(self.options.device)
        precision = Precision(dtype)  # type: ignore[arg-type]
        forget = np.isin(self.data.train.labels, self.options.forget)
        run = Run(
            model=copy.deepcopy(start), loader=self.loader(False, seed), recipe=method.recipe,
            ranks=Ranks(device=device), seed=seed, forget=torch.from_numpy(forget).to(device),
            forget_classes=self.options.forget, precision=precision,
        )  # fmt: skip
        precision.apply(run.model, device)
        run_method(method, run)
        return run.model

    def accuracies(self, model: Classifier) -> dict[str, float]:
        """FA, RA, TFA and TRA in float32."""
        loaders = {"train": self.loader(False, 0), "test": self.loader(True, 0)}
        ranks = Ranks(device=torch.device(self.options.device))
        counts = sweep("model", model, loaders, ranks).accuracies
        return {name: counts[name].correct / counts[name].total for name in METRICS}


Found = dict[tuple[str, str], list[dict[str, float]]]  # method, format -> accuracies by seed


def rows_of(found: Found, x: str, device: str) -> list[Row]:
    """Accuracies of each format, and what bfloat16 changes, paired by seed."""
    rows = []
    for (method, dtype), runs in found.items():
        for metric in METRICS:
            values = [run[metric] for run in runs]
            rows.append(row("dtype", dtype, values, metric=metric, unit="share", mode=method,
                            x=x, device=device))  # fmt: skip
            if dtype == "bf16":
                pairs = zip(runs, found[method, "fp32"], strict=True)
                apart = [half[metric] - full[metric] for half, full in pairs]
                rows.append(row("dtype", dtype, apart, metric=f"{metric} difference",
                                unit="share", mode=method, x=x, device=device))  # fmt: skip
    return rows


def lost(found: Found, method: str, metric: str = "TRA") -> list[float]:
    """Float32 less bfloat16, by seed."""
    pairs = zip(found[method, "fp32"], found[method, "bf16"], strict=True)
    return [full[metric] - half[metric] for full, half in pairs]


def _mean(values: Sequence[float]) -> str:
    apart = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{apart}"


def main(options: Options) -> int:
    """Train all, seed by seed, formats in turn."""
    bench = Bench(open_data(str(options.photos)), options)
    classes = len(bench.data.classes)
    found: Found = {}
    x = f"{options.model}, {options.size} px, {len(bench.data.train)} images"
    for seed in options.seeds:
        preset = bench.loader(False, seed).preset
        new = build(options.model, classes, seed, preset)
        first = Train(methods(options)["retrain"].recipe)
        original = bench.trained(first, new, "fp32", seed)
        found.setdefault(("original", "fp32"), []).append(bench.accuracies(original))
        for name, method in methods(options).items():
            # Retraining takes another seed, whose weights are not the original's first ones.
            start = build(options.model, classes, 1000 + seed, preset) if method.fresh else original
            for dtype in FORMATS:
                model = bench.trained(method, start, dtype, seed)
                done = bench.accuracies(model)
                found.setdefault((name, dtype), []).append(done)
                told = {k: round(v, 3) for k, v in done.items()}
                print(f"seed {seed}: {name}, {dtype}: {told}", flush=True)
        rows = rows_of(found, x, options.device)
        write(rows, options.out)
    show(rows)
    for name in methods(options):
        print(f"{name}: TRA, bf16 less fp32: {_mean([-v for v in lost(found, name)])} points")
    return int(any(fmean(lost(found, name)) > POINT for name in methods(options)))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
