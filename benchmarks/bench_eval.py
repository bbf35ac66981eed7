"""Evaluation of one model: ours against the field's way; k-NN backends; CKA of all layers.

    python benchmarks/bench_eval.py --out benchmarks/results/eval_cpu.csv

"field" is the published code's way (field_eval.py). Images are random: what is timed does not look
at them. Both ways read the same loader from memory, so what the field's further passes cost in
decoding is not in these rows.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from field_eval import field_accuracy, field_cka, field_knn
from harness import Row, compare, ratio, show, write
from sklearn.neighbors import KNeighborsClassifier

from letheon.engine.distributed import Ranks
from letheon.engine.model import Classifier, build
from letheon.engine.precision import Precision
from letheon.eval import splits
from letheon.eval.cka import centred, linear_cka
from letheon.eval.knn import knn
from letheon.eval.layers import convolutions, layer_cka
from letheon.eval.measure import Conditions, measure
from letheon.eval.passes import Passes, sweep
from letheon.loaders.images import ArrayImages
from letheon.loaders.torch_loader import TorchLoader

CLASSES = 10


def noise(n: int, model: Classifier, seed: int) -> TorchLoader:
    """A loader of `n` random images of the model's size; class 0 is to be forgotten."""
    draw = np.random.default_rng(seed)
    size = model.preset.size
    pixels = draw.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    labels = draw.integers(0, CLASSES, n)
    images = ArrayImages("noise", pixels, labels, [str(c) for c in range(CLASSES)])
    return TorchLoader(images, labels == 0, model.preset, 256, 0)


def bench_model(repeats: int) -> list[Row]:
    """One model over train, test and four domains: accuracy, k-NN on all eight parts, CKA."""
    model, retrained = (build("resnet20", CLASSES, seed).eval() for seed in (1, 2))
    theirs = copy.deepcopy(model), copy.deepcopy(retrained)  # NCHW; ours are channels-last
    for ours_net in (model, retrained):
        Precision("fp32").apply(ours_net, torch.device("cpu"))
    sizes = {"train": 600, "test": 400} | {f"domain/{d}": 150 for d in "abcd"}
    loaders = {key: noise(n, model, seed) for seed, (key, n) in enumerate(sizes.items())}
    parts = {
        (key, part): np.flatnonzero(loaders[key].forget == part).tolist()
        for key in ("train", "test")
        for part in (True, False)
    }

    def field() -> None:
        for (key, _), chosen in parts.items():
            field_accuracy(theirs[0], loaders[key], chosen)
        for (key, forget), chosen in parts.items():
            thin = 0.1 if (key, forget) == ("train", False) else 1
            field_knn(theirs[0], loaders[key], chosen, thin)
        for key in sizes:
            if key.startswith("domain/"):
                field_knn(theirs[0], loaders[key], None, 1)
        for (key, _), chosen in parts.items():
            field_cka(*theirs, loaders[key], chosen)

    def finished(ours: Passes, reference: Passes) -> None:
        """The same numbers as `field`: k-NN and CKA on the upstream parts too."""
        measure(ours, None, reference, Conditions())
        for (key, _), chosen in parts.items():
            rows = torch.tensor(chosen)
            x, y = ours.outputs[key].features[rows], ours.outputs[key].labels[rows]
            if key == "train":  # measure compares the test set
                linear_cka(x, reference.outputs[key].features[rows])
            cut = splits.split(len(chosen))
            knn(x[cut.database], y[cut.database], x[cut.queries], y[cut.queries])

    def ours(reference: Passes | None = None) -> None:
        known = reference or sweep("retrained", retrained, loaders, Ranks())
        finished(sweep("model", model, loaders, Ranks()), known)

    known = sweep("retrained", retrained, loaders, Ranks())
    variants: dict[str, Callable[[], object]] = {
        "field": field,
        "ours, reference known": lambda: ours(known),
        "ours, reference too": ours,
    }
    rows = compare("evaluate", variants, repeats, 1, x="resnet20, 1000 + 4 x 150")
    for variant in list(variants)[1:]:
        print(f"evaluate: {variant} {ratio(rows, variant, 'field'):.2f} times the field's speed")
    return rows


def bench_search(repeats: int, queries: int = 500, width: int = 2048) -> list[Row]:
    """k-NN at k = 200: the database grows; scikit-learn, FAISS and torch on the same vectors."""
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32000, width, generator=generator).relu()
    q = torch.randn(queries, width, generator=generator).relu()
    y, truth = (torch.randint(65, (len(v),), generator=generator) for v in (x, q))
    for n in (2000, 8000, 32000):
        near = x[:n], y[:n]

        def field(near: Any = near) -> float:
            found = KNeighborsClassifier(200, metric="cosine", algorithm="brute")
            return float(found.fit(near[0].numpy(), near[1].numpy()).score(q.numpy(), truth))

        def search(backend: Any, near: Any = near) -> object:
            return knn(*near, q, truth, (1, 5, 10, 20, 200), backend=backend)

        variants: dict[str, Callable[[], object]] = {
            "field, k = 200": field,
            "ours, torch, five k": lambda search=search: search("torch"),
            "ours, float64": lambda search=search: search("torch-fp64"),
        }
        if importlib.util.find_spec("faiss"):
            variants["ours, faiss"] = lambda search=search: search("faiss")
        rows += compare("knn", variants, repeats, 1, x=f"{n} x {width}, {queries} queries")
    return rows


def bench_layers(repeats: int, images: int = 96, batch: int = 32) -> list[Row]:
    """Exact CKA of ResNet-50's 53 convolutions between two models, against bare forward passes."""
    models = {name: build("resnet50", CLASSES, seed).eval() for seed, name in enumerate("ab")}
    loader = noise(images, models["a"], 0)
    loader.batch_size = batch
    taps = convolutions(models["a"])

    @torch.no_grad()
    def bare() -> None:
        for part in loader.sweep():
            for model in models.values():
                model(part.images)

    variants: dict[str, Callable[[], object]] = {
        "bare forward passes": bare,
        "ours, 53 layers": lambda: layer_cka(models, loader, Ranks(), taps),
    }
    rows = compare("layers", variants, repeats, 1, x=f"resnet50, {images} images of 224")
    print(f"layers: {1 / ratio(rows, 'ours, 53 layers', 'bare forward passes'):.3f} of bare passes")
    return rows


def bench_cka(repeats: int, n: int = 10000, width: int = 2048) -> list[Row]:
    """Exact CKA of stored features, and one side's own term, which is computed once a model."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, width, generator=generator).relu() for _ in "xy")
    variants: dict[str, Callable[[], object]] = {
        "both sides": lambda: linear_cka(x, y),
        "own term": lambda: centred("y", y),
    }
    return compare("cka", variants, repeats, 0, x=f"{n} x {width}")


BENCHES = {
    "model": bench_model,
    "search": bench_search,
    "layers": bench_layers,
    "cka": bench_cka,
}


@dataclass(frozen=True)
class Options:
    """What to time, and where the rows go."""

    only: tuple[str, ...] = tuple(BENCHES)
    """of model, search, layers, cka"""
    repeats: int = 5
    """timed calls of each variant, after one of warm-up"""
    threads: int = 1
    """threads of torch on the CPU"""
    out: Path | None = None
    """CSV file to write; printed only, if not given"""


def main(options: Options) -> None:
    """Run the benches and write their rows."""
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in options.only:
        new = BENCHES[name](options.repeats)
        show(new)
        rows += new
    if options.out is not None:
        write(rows, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
