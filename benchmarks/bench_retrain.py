"""Retraining, the expensive reference: the fast recipe beside the plain schedule.

    python benchmarks/bench_retrain.py --data CIFAR10 --out benchmarks/results/retrain_cpu.csv

Plain: SGD, 0.1 to 0 by a cosine over 182 epochs, as published. Fast: a quarter of the epochs, small
images first, a triangular rate, smoothed labels, no decay of norms, an average of the weights, and
the mirrored image beside the image at the test. Speed: the network speed_cnn with the options of
launch/recipes/fast/cifar94.toml, and mirrored and moved images at the test. Wide: the same for
speed_cnn_wide and cifar96.toml. The same images, loader, precision and seeds, and for plain and
fast the same network; one class is left out, and accuracy is on the test images of the others.
Images are decoded before the clock starts; on a GPU they lie in its memory, and the first run of a
variant, which chooses the library's convolutions, is not the first seed's but one more. Time is for
the training alone, without the compiler; of the processor it is that of all threads, with it.
The exit code is 1 where fast is less accurate than plain by more than a point.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import torch
import tyro
from harness import Results, Row, row
from numpy.typing import NDArray

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Run
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.eval.inference.extract import InferenceOptions, extract
from letheon.loaders.backends.resident_loader import ResidentLoader
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Loader, Reader
from letheon.loaders.datasets.image_set import ArrayImages, ImageSet
from letheon.loaders.open import open_data
from letheon.loaders.preset import Preset
from letheon.methods.retrain import Retrain

SIZE = 32
HALF = (0.5, 0.5, 0.5)
PRESET = Preset(SIZE, HALF, HALF, "none", SIZE, augment="pad-crop-flip")
POINT = 0.01
UNITS = {"processor": "s", "wall": "s", "accuracy": "share"}


@dataclass(frozen=True)
class Options:
    """On what, and how long."""

    data: Path
    """Folder with train/<class>/ and test/<class>/ of small images."""
    out: Path = Path("benchmarks/results/retrain_cpu.csv")
    per_class: int = 200
    """Training images of each class."""
    test_per_class: int = 500
    model: str = "small"
    seeds: tuple[int, ...] = (1, 2, 3)
    plain_epochs: int = 182
    fast_epochs: int = 46
    speed_epochs: int = 8
    speed_batch_size: int = 500
    wide_epochs: int = 31
    variants: tuple[Literal["plain", "fast", "speed", "wide"], ...] = ("plain", "fast")
    batch_size: int = 64
    """Of the fast recipe; the plain one has 256. Its peak rate is 0.1 for 64, in proportion."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of all recipes."""
    compile: Literal["off", "default", "max"] = "off"
    device: str = "cpu"


def recipes(options: Options) -> dict[str, Retrain]:
    """The schedules that are asked for."""
    plain = Recipe(epochs=options.plain_epochs, lr=0.1, batch_size=256, schedule="cosine")
    n, size = options.fast_epochs, options.batch_size
    fast = Recipe(
        epochs=n, lr=0.1 * size / 64, batch_size=size, schedule="linear", warmup=n / 5, ema=0.95,
    )  # fmt: skip
    speed = Recipe(
        epochs=options.speed_epochs, lr=0.24, batch_size=options.speed_batch_size, momentum=0.6,
        weight_decay=0.2, optimizer="muon", schedule="linear",
    )  # fmt: skip
    wide = Recipe(
        epochs=options.wide_epochs, lr=1.17, batch_size=1024, momentum=0.85,
        weight_decay=0.00133, schedule="linear", warmup=min(7, options.wide_epochs), ema=0.98,
    )  # fmt: skip
    methods = {
        "plain": Retrain(plain),
        "fast": Retrain(
            fast, label_smoothing=0.1, sizes=(24, SIZE), grow_at=(2 * n // 3,), decay_norms=False
        ),
        "speed": Retrain(
            speed, label_smoothing=0.2, decay_norms=False, bias_rate=1180, head_rate=0.227
        ),
        "wide": Retrain(
            wide, label_smoothing=0.2, decay_norms=False, bias_rate=64, head_rate=0.0123
        ),
    }
    return {variant: methods[variant] for variant in options.variants}


NETWORKS = {"speed": "speed_cnn", "wide": "speed_cnn_wide"}


def network_of(options: Options) -> str:
    """The networks that are trained, by name, each once."""
    return " and ".join(dict.fromkeys(NETWORKS.get(v, options.model) for v in options.variants))


def loader_of(
    images: ArrayImages, forget: NDArray[np.bool_], preset: Preset, batch: int, reader: Reader
) -> Loader:
    """Images in the memory of the device."""
    if reader.device == "cpu":
        return TorchLoader(images, forget, preset, batch, reader)
    return ResidentLoader(images, forget, preset, batch, reader)


def first_images(images: ImageSet, per_class: int) -> ArrayImages:
    """The first images of each class, decoded, at 32 pixels."""
    firsts = [np.flatnonzero(images.labels == c)[:per_class] for c in np.unique(images.labels)]
    indices = np.sort(np.concatenate(firsts))
    pixels = np.stack([np.asarray(image) for image in images.read_many(indices)])
    assert pixels.shape[1:] == (SIZE, SIZE, 3), "expected images of 32 x 32 pixels"
    return ArrayImages("first", pixels, images.labels[indices], list(images.classes))


def accuracy(model: Classifier, images: ArrayImages, variant: str) -> float:
    """The share of right answers, float32, with the variant's views of an image at the test."""
    device = next(model.parameters()).device
    reader = Reader(0, device=device.type)
    loader = loader_of(images, np.zeros(len(images), bool), model.preset, 500, reader)
    views = InferenceOptions(flip=variant != "plain", shift=variant in NETWORKS)
    outputs = extract(model, loader, Ranks(device=device), views)
    return float((outputs.logits.argmax(1) == outputs.labels).double().mean())


def train_once(
    variant: str, train: ArrayImages, test: ArrayImages, seed: int, options: Options
) -> dict[str, float]:
    """Retrain without class 0: seconds of the processor and the wall, and the accuracy."""
    forget, device = train.labels == 0, torch.device(options.device)
    name = NETWORKS.get(variant, options.model)
    preset = None if variant in NETWORKS else PRESET
    model = build(name, len(train.classes), seed, preset)
    method = recipes(options)[variant]
    recipe = method.recipe
    reader = Reader(seed, device=device.type)
    run = Run(
        model=model,
        loader=loader_of(train, forget, model.preset, recipe.batch_size, reader),
        recipe=recipe, ranks=Ranks(device=device), seed=seed,
        forget=torch.from_numpy(forget).to(device), forget_classes=(0,),
        precision=Precision(options.dtype, compile=options.compile),
    )  # fmt: skip
    wall, processor = time.perf_counter(), time.process_time()
    seconds = run_method(method, run)
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = {
        "wall": time.perf_counter() - wall - seconds.compile,
        "processor": time.process_time() - processor,
    }
    return {**spent, "accuracy": accuracy(model, test, variant)}


def summary_rows(runs_of: Mapping[str, list[dict[str, float]]], x: str, device: str) -> list[Row]:
    """Seconds, accuracies, and ratios to the plain recipe seed by seed."""
    rows = []
    for variant, runs in runs_of.items():
        for metric, unit in UNITS.items():
            values = [run[metric] for run in runs]
            rows.append(row("retrain", variant, values, metric=metric, unit=unit, mode="training",
                            x=x, device=device))  # fmt: skip
        if variant != "plain" and "plain" in runs_of:
            for metric in ("processor", "wall"):
                pairs = zip(runs_of["plain"], runs, strict=True)
                ratios = [plain[metric] / run[metric] for plain, run in pairs]
                rows.append(row("retrain", variant, ratios, metric=f"ratio, {metric}",
                                unit="times", mode="training", x=x, device=device))  # fmt: skip
    return rows


def main(options: Options) -> int:
    """Train all, seed by seed, recipes in turn."""
    data = open_data(str(options.data))
    train, test = (
        first_images(data.train, options.per_class),
        first_images(data.test, options.test_per_class),
    )
    others = np.flatnonzero(test.labels != 0)
    test = ArrayImages("test", test.pixels[others], test.labels[others], list(test.classes))
    n = int((train.labels != 0).sum())
    epochs = [str(method.recipe.epochs) for method in recipes(options).values()]
    x = f"{network_of(options)}, {SIZE} px, {n} images, {len(test)} tested"
    x += f", {' and '.join(epochs)} epochs"
    results = Results(options.out)
    runs: dict[str, list[dict[str, float]]] = {}
    one_epoch = replace(
        options, plain_epochs=1, fast_epochs=3, speed_epochs=1, wide_epochs=1
    )  # fmt: skip
    if options.device != "cpu":
        for variant in options.variants:  # chooses the library's convolutions
            train_once(variant, train, test, 0, one_epoch)
    for seed in options.seeds:
        for variant in options.variants:
            run = train_once(variant, train, test, seed, options)
            runs.setdefault(variant, []).append(run)
            results.add(
                row("retrain", variant, [run[metric]], metric=f"seed {seed}, {metric}",
                    unit=unit, mode="training", x=x, device=options.device)
                for metric, unit in UNITS.items()
            )  # fmt: skip
    results.add(summary_rows(runs, x, options.device))
    if not {"plain", "fast"} <= set(runs):
        return 0
    plain, fast = (fmean(r["accuracy"] for r in runs[variant]) for variant in ("plain", "fast"))
    print(f"fast less plain: {100 * (fast - plain):+.2f} points")
    return int(plain - fast > POINT)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
