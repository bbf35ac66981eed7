"""Evaluation of one model: ours against the field's way; k-NN backends; CKA of all layers.

    python benchmarks/bench_eval.py --images cifar10 --domains pacs --out results/eval_cpu.csv

"field" is the published code's way (field_eval.py). In the model bench both ways read the same JPEG
files, the field anew in each of its three passes; with "reference known" the retrained model's
features are kept from an earlier evaluation, on both sides. The other benches look at random
numbers: what is timed does not depend on them.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from baseline_data import Loaded
from field_eval import field_accuracy, field_cka, field_features, field_knn, field_loader
from harness import Row, compare, ratio, row, show, write
from sklearn.neighbors import KNeighborsClassifier

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import Precision
from letheon.errors import InputError
from letheon.eval.inference.layer_cka import convolutions, layer_cka
from letheon.eval.inference.passes import Passes, Swept, sweep_together
from letheon.eval.metrics import knn_splits
from letheon.eval.metrics.cka import centred, linear_cka
from letheon.eval.metrics.knn import knn
from letheon.eval.quick_row import Conditions, measure
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.open import open_data, open_domains
from letheon.loaders.preset import Preset

CLASSES = 10


@dataclass(frozen=True)
class Options:
    """What to time, and where the rows go."""

    only: tuple[str, ...] = ("model", "search", "layers", "cka")
    """of model, search, layers, cka"""
    images: Path | None = None
    """folder of JPEG files for the model bench: train/<class>/ and val/ or test/<class>/"""
    domains: Path | None = None
    """folder of JPEG files <domain>/<class>/, likewise"""
    repeats: int = 5
    """timed calls of each variant, after one of warm-up"""
    threads: int = 1
    """threads of torch on the CPU"""
    out: Path | None = None
    """CSV file to write; printed only, if not given"""


class Reading(NamedTuple):
    """One image set, as each way reads it: the same files, no other process."""

    ours: TorchLoader
    folder: Path  # <class>/*
    chosen: list[int]  # numbers of the images read, in name order, evenly spaced

    def part(self, forget: bool | None) -> list[int]:
        """The chosen images that are to be forgotten, those that are not, or all."""
        return [i for i in self.chosen if forget is None or bool(self.ours.forget[i]) == forget]


def readings(options: Options, preset: Preset) -> dict[str, Reading]:
    """1,000 training, 300 held-out and 40 images of each domain: the share that ImageNet has."""
    if options.images is None or options.domains is None:
        raise InputError("got no --images and --domains, whose files the model bench reads")
    held = next(name for name in ("val", "test") if (options.images / name).is_dir())
    data, domains = open_data(str(options.images)), open_domains(str(options.domains))
    wanted = {
        "train": (data.train, options.images / "train", 1000),
        "test": (data.test, options.images / held, 300),
    }
    wanted |= {f"domain/{d}": (domains[d], options.domains / d, 40) for d in domains}
    found = {}
    for key, (images, folder, most) in wanted.items():
        loader = TorchLoader(images, images.labels == 0, preset, 256, Reader(0))
        found[key] = Reading(
            loader, folder, list(range(0, len(images), len(images) // most))[:most]
        )
    return found


def bench_model(options: Options) -> list[Row]:
    """One model over train, test and the domains: accuracy, k-NN on all parts, CKA, from files."""
    model, retrained = (build("resnet20", CLASSES, seed).eval() for seed in (1, 2))
    theirs = copy.deepcopy(model), copy.deepcopy(retrained)  # NCHW; ours are channels-last
    for ours_net in (model, retrained):
        Precision("fp32").apply(ours_net, torch.device("cpu"))
    sets = readings(options, model.preset)
    loaders = {key: reading.ours for key, reading in sets.items()}
    chosen = {key: reading.chosen for key, reading in sets.items()}
    parts = [(key, part) for key in ("train", "test") for part in (True, False)]

    def read(key: str, part: bool | None) -> Loaded:
        return field_loader(sets[key].folder, model.preset, sets[key].part(part))

    def field(kept: dict[tuple[str, bool], list[torch.Tensor]] | None = None) -> None:
        for key, forget in parts:
            field_accuracy(theirs[0], read(key, forget))
        for key, forget in parts:
            thin = 0.1 if (key, forget) == ("train", False) else 1
            field_knn(theirs[0], read(key, forget), thin)
        for key in sets:
            if key.startswith("domain/"):
                field_knn(theirs[0], read(key, None), 1)
        for key, forget in parts:
            field_cka(theirs[0], kept[key, forget] if kept else theirs[1], read(key, forget))

    def finished(ours: Passes, reference: Passes) -> None:
        """The same numbers as `field`: k-NN and CKA on the upstream parts too."""
        measure(ours, None, reference, Conditions())
        for key, part in parts:
            x, other = (side.outputs[key] for side in (ours, reference))
            rows = x.forget == part
            if key == "train":  # measure compares the test set
                linear_cka(x.features[rows], other.features[rows])
            own, labels = x.features[rows], x.labels[rows]
            cut = knn_splits.split(len(own))
            knn(own[cut.database], labels[cut.database], own[cut.queries], labels[cut.queries])

    def passes(*nets: Classifier, dtype: Any = "fp32") -> list[Passes]:
        swept = [Swept("model", net) for net in nets]
        return sweep_together(swept, loaders, Ranks(), Precision(dtype), parts=chosen)

    kept = {(key, part): field_features(theirs[1], read(key, part)) for key, part in parts}
    known, known_bf16 = passes(retrained)[0], passes(retrained, dtype="bf16")[0]
    variants: dict[str, Callable[[], object]] = {
        "field": field,
        "field, reference known": lambda: field(kept),
        "ours": lambda: finished(*passes(model, retrained)),
        "ours, reference known": lambda: finished(*passes(model), known),
        "ours, bf16": lambda: finished(*passes(model, retrained, dtype="bf16")),
        "ours, bf16, reference known": lambda: finished(*passes(model, dtype="bf16"), known_bf16),
    }
    counts = f"{sum(len(v) for k, v in chosen.items() if '/' not in k)} images, " + (
        f"{sum(len(v) for k, v in chosen.items() if '/' in k)} of domains"
    )
    rows = compare("evaluate", variants, options.repeats, 1, x=f"resnet20, {counts}")
    for variant in list(variants)[2:]:
        base = "field, reference known" if "known" in variant else "field"
        print(f"evaluate: {variant}: {ratio(rows, variant, base):.2f} times as fast as {base}")
    return rows


def bench_search(options: Options, queries: int = 500, width: int = 2048) -> list[Row]:
    """k-NN at k = 200: the database grows; scikit-learn, FAISS and torch on the same vectors.

    What 1M rows and 10,000 queries take follows from the line through the sizes up to 32,000, in
    the number of rows and for each query; the largest size measured is left out, and checks it.
    """
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(0)
    sizes = (2000, 8000, 32000, 128000)
    x = torch.randn(sizes[-1], width, generator=generator).relu_()
    q = torch.randn(queries, width, generator=generator).relu_()
    y, truth = (torch.randint(65, (len(v),), generator=generator) for v in (x, q))
    for n in sizes:
        near = x[:n], y[:n]

        def field(near: Any = near) -> float:
            found = KNeighborsClassifier(200, metric="cosine", algorithm="brute")
            return float(found.fit(near[0].numpy(), near[1].numpy()).score(q.numpy(), truth))

        def search(backend: Any, near: Any = near) -> object:
            return knn(*near, q, truth, (1, 5, 10, 20, 200), backend=backend)

        variants: dict[str, Callable[[], object]] = {
            "ours, torch, five k": lambda search=search: search("torch"),
        }
        if importlib.util.find_spec("faiss"):
            variants["ours, faiss"] = lambda search=search: search("faiss")
        if n < sizes[-1]:
            variants["field, k = 200"] = field
            variants["ours, float64"] = lambda search=search: search("torch-fp64")
        repeats = options.repeats if n < sizes[-1] else 1
        rows += compare("knn", variants, repeats, 1, x=f"{n} x {width}, {queries} queries")
    return rows + extrapolated(rows, sizes, queries, width)


def extrapolated(rows: list[Row], sizes: tuple[int, ...], queries: int, width: int) -> list[Row]:
    """Seconds for 1M rows and 10,000 queries, by least squares on all sizes but the largest."""
    found = []
    for variant in dict.fromkeys(r.variant for r in rows):
        times = [r.median for r in rows if r.variant == variant]
        slope, start = np.polyfit(sizes[:3], times[:3], 1, w=1 / np.array(times[:3]))
        seconds = (start + slope * 1e6) * 10_000 / queries / 1e3
        print(f"knn: {variant}: {start:.1f} ms + {1e3 * slope:.2f} ms a 1,000 rows; ", end="")
        if len(times) > 3:
            print(
                f"{sizes[3]} rows: {start + slope * sizes[3]:.0f} ms foretold, {times[3]} measured"
            )
        else:
            print(f"{sizes[3]} rows not measured")
        found += [
            row("knn", variant, [seconds], metric="extrapolated time", unit="s",
                x=f"1000000 x {width}, 10000 queries", device="cpu")
        ]  # fmt: skip
    return found


def noise(n: int, model: Classifier, seed: int) -> TorchLoader:
    """A loader of `n` random images of the model's size."""
    draw = np.random.default_rng(seed)
    size = model.preset.size
    pixels = draw.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    labels = draw.integers(0, CLASSES, n)
    images = ArrayImages("noise", pixels, labels, [str(c) for c in range(CLASSES)])
    return TorchLoader(images, labels == 0, model.preset, 256, Reader(0))


def bench_layers(options: Options) -> list[Row]:
    """Exact CKA of ResNet-50's 53 convolutions between two models, against bare forward passes.

    Reading the sums at the end costs the same for any number of images, so two numbers are timed.
    """
    models = {name: build("resnet50", CLASSES, seed).eval() for seed, name in enumerate("ab")}
    for model in models.values():
        Precision("fp32").apply(model, torch.device("cpu"))
    taps = convolutions(models["a"])
    rows: list[Row] = []
    medians = []
    for images in (32, 96):
        loader = noise(images, models["a"], 0)
        loader.batch_size = 32

        @torch.no_grad()
        def bare(loader: TorchLoader = loader) -> None:
            for part in loader.sweep():
                for model in models.values():
                    model(part.images)

        def layers(loader: TorchLoader = loader) -> None:
            layer_cka(models, loader, Ranks(), taps)

        variants: dict[str, Callable[[], object]] = {
            "bare forward passes": bare,
            "ours, 53 layers": layers,
        }
        warm = 1 if images == 32 else 0
        new = compare("layers", variants, 2, warm, x=f"resnet50, {images} images of 224")
        medians.append([r.median for r in new])
        rows += new
        print(f"layers: {new[1].median / new[0].median:.2f} of bare passes over {images} images")
    each = [(more - less) / 64 for less, more in zip(*medians, strict=True)]
    print(f"layers: {each[1] / each[0]:.2f} of a bare pass for each further image")
    return rows


def bench_cka(options: Options, n: int = 10000, width: int = 2048) -> list[Row]:
    """Exact CKA of stored features, and one side's own term, which is computed once a model."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, width, generator=generator).relu() for _ in "xy")
    variants: dict[str, Callable[[], object]] = {
        "both sides": lambda: linear_cka(x, y),
        "own term": lambda: centred("y", y),
    }
    return compare("cka", variants, min(3, options.repeats), 0, x=f"{n} x {width}")


BENCHES = {
    "model": bench_model,
    "search": bench_search,
    "layers": bench_layers,
    "cka": bench_cka,
}


def main(options: Options) -> None:
    """Run the benches and write their rows."""
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in options.only:
        new = BENCHES[name](options)
        show(new)
        rows += new
    if options.out is not None:
        write(rows, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
