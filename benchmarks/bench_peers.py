"""Our parts beside those of packages that people use, in the same run: k-NN, accuracy, loader.

    pip install scikit-learn faiss-cpu timm lightly pytorch-lightning torchmetrics spdl
    python benchmarks/bench_peers.py --photos FOLDER --out benchmarks/results/peers_cpu.csv

A peer that is not installed is named and left out. Rows of `agreement` say which share of the
answers is ours; `docs/benchmarks.md` says where a peer is faster and why it is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from harness import Row, interleave, row, show, write
from torch import Tensor

from letheon.eval.inference.extract import Outputs
from letheon.eval.metrics.accuracy import per_class
from letheon.eval.metrics.knn import knn
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.factory import make_loader
from letheon.loaders.open import open_data
from letheon.loaders.preset import Preset

K = 5
WORKERS = 2
BATCH = 64
Answer = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """Where from, where to."""

    photos: Path | None = None
    """Folder with train/<class>/ and val/<class>/ for the loaders; without it they are left out."""
    out: Path = Path("benchmarks/results/peers_cpu.csv")
    repeats: int = 5


def installed(name: str, package: str | None = None) -> Any | None:
    """The module; None, with a word, where it cannot be had."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        print(f"left out {package or name}: {error}", flush=True)
        return None


def called(peer: str, package: str) -> str:
    """The peer's name with its version."""
    try:
        return f"{peer} {version(package)}"
    except PackageNotFoundError:
        return peer


def neighbours(database: int, queries: int, width: int, classes: int) -> dict[str, Answer]:
    """Who answers a k-NN question, as (Q,) predictions; features about class centres."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=draw)

    def some(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % classes
        return centres[labels] + 3 * torch.randn(n, width, generator=draw), labels

    (x, y), (q, truth) = some(database), some(queries)
    found: dict[str, Answer] = {"ours": lambda: knn(x, y, q, truth, (K,)).predictions[K]}
    if (sk := installed("sklearn.neighbors", "scikit-learn")) is not None:
        rows = x.numpy(), y.numpy(), q.numpy()

        def by_sklearn() -> Tensor:
            model = sk.KNeighborsClassifier(K, metric="cosine").fit(rows[0], rows[1])
            return torch.from_numpy(model.predict(rows[2]))

        found[called("scikit-learn", "scikit-learn")] = by_sklearn
    if (faiss := installed("faiss", "faiss-cpu")) is not None:

        def by_faiss() -> Tensor:
            index = faiss.IndexFlatIP(width)
            index.add(F.normalize(x).numpy())
            places = torch.from_numpy(index.search(F.normalize(q).numpy(), K)[1])
            return F.one_hot(y[places], classes).sum(1).argmax(1)

        found[called("faiss", "faiss-cpu")] = by_faiss
    if (lightly := installed("lightly.utils.benchmarking.knn", "lightly")) is not None:

        def by_lightly() -> Tensor:
            bank = F.normalize(x).T.contiguous()
            # A large temperature: each neighbour counts the same, as in ours.
            told: Tensor = lightly.knn_predict(F.normalize(q), bank, y, classes, K, 1e6)
            return told[:, 0]

        found[called("lightly", "lightly")] = by_lightly
    return found


def accuracies(n: int, classes: int) -> dict[str, Answer]:
    """Who counts accuracy by class, as (C,) shares."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    logits = torch.randn(n, classes, generator=draw)
    logits[torch.arange(n), labels] += 2
    outputs = Outputs(logits[:, :1], logits, labels, labels == 0, torch.arange(n))
    found: dict[str, Answer] = {
        "ours": lambda: torch.tensor([count.share for count in per_class(outputs, classes)])
    }
    if (metrics := installed("torchmetrics.functional.classification", "torchmetrics")) is not None:
        found[called("torchmetrics", "torchmetrics")] = lambda: metrics.multiclass_accuracy(
            logits, labels, classes, average=None
        )
    return found


def epochs(photos: Path) -> dict[str, Answer]:
    """Who reads an epoch of training batches, 224 px float32; each gives the number of images."""
    images = open_data(str(photos)).train
    assert isinstance(images, FileImages), "expected a folder of image files"
    paths = [images.path(i) for i in range(len(images))]
    preset, nothing = Preset(224), np.zeros(len(images), bool)
    ours = make_loader("auto", images, nothing, preset, BATCH, Reader(0, workers=WORKERS))
    turns = iter(range(10**9))
    found: dict[str, Answer] = {
        "ours": lambda: sum(len(b.labels) for b in ours.train("mixed", next(turns)))
    }
    if (timm := installed("timm.data", "timm")) is not None:
        loader = timm.create_loader(
            timm.ImageDataset(str(photos / "train")), (3, 224, 224), BATCH, is_training=True,
            color_jitter=None, num_workers=WORKERS, use_prefetcher=False, device="cpu",
        )  # fmt: skip
        found[called("timm", "timm")] = lambda: sum(len(labels) for _, labels in loader)
    if (spdl := installed("spdl.io", "spdl")) is not None:
        try:
            spdl.load_image_batch(paths[:1], width=224, height=224)
        except RuntimeError:
            print("left out spdl: it cannot decode; it needs FFmpeg's shared libraries", flush=True)
        else:
            found[called("spdl, whole image", "spdl")] = lambda: spdl_epoch(paths, preset)
    return found


def spdl_epoch(paths: list[str], preset: Preset) -> int:
    """Threads that decode and scale the whole image; it has no random crop of its own."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    mean, std = (255 * torch.tensor(m) for m in (preset.mean, preset.std))

    def batches() -> Iterator[list[str]]:
        for start in range(0, len(paths), BATCH):
            yield paths[start : start + BATCH]

    def load(part: list[str]) -> Tensor:
        buffer = spdl.io.load_image_batch(part, width=224, height=224, pix_fmt="rgb24")
        pixels: Tensor = spdl.io.to_torch(buffer)
        return pixels.float().sub_(mean).div_(std).permute(0, 3, 1, 2)

    pipeline = (
        PipelineBuilder().add_source(batches()).pipe(load, concurrency=WORKERS).add_sink(2)
    ).build(num_threads=WORKERS)  # fmt: skip
    with pipeline.auto_stop():
        return sum(len(batch) for batch in pipeline)


def compared(name: str, ways: dict[str, Answer], repeats: int, x: str) -> list[Row]:
    """Milliseconds, in turn, and which share of the answers is ours."""
    rows = []
    for peer, times in interleave(ways, repeats, 1).items():
        rows.append(row(name, peer, times, x=x, device="cpu"))
    answer = ways["ours"]()
    if isinstance(answer, Tensor):
        for peer, way in ways.items():
            share = float(torch.isclose(way().to(answer.dtype), answer).double().mean())
            rows.append(row(name, peer, [share], metric="agreement", unit="share", x=x,
                            device="cpu"))  # fmt: skip
    return rows


def main(options: Options) -> None:
    """Measure, write, show."""
    rows: list[Row] = []
    for database, queries, width, classes in ((2_000, 500, 512, 65), (20_000, 2_000, 2048, 1000)):
        ways = neighbours(database, queries, width, classes)
        x = f"{queries} of {database}, width {width}"
        rows += compared("k-NN", ways, options.repeats, x)
    rows += compared("accuracy by class", accuracies(10_000, 1000), options.repeats, "10000 x 1000")
    if options.photos is not None:
        ways = epochs(options.photos)
        counts = {peer: way() for peer, way in ways.items()}
        for peer, times in interleave(ways, options.repeats, 0).items():
            rates = [1e3 * counts[peer] / t for t in times]
            rows.append(row("loader", peer, rates, metric="images per second", unit="1/s",
                            mode="training", x=f"{counts['ours']} JPEGs, {WORKERS} workers",
                            device="cpu"))  # fmt: skip
    write(rows, options.out)
    show(rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
