"""k-NN and CKA of stored features, ours beside the field's; and the memory of a rank.

    python benchmarks/bench_eval.py --out benchmarks/results/eval_cpu.csv

What is timed does not depend on the numbers. A whole evaluation beside the field's way is the job
"evaluation" of bench_end_to_end.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from harness import Results, Row, compare, memory, reset_peak, row
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Output
from letheon.eval.inference.extract import extract
from letheon.eval.inference.passes import Passes
from letheon.eval.metrics.cka import center, linear_cka
from letheon.eval.metrics.knn import knn
from letheon.eval.quick_row import measure
from letheon.loaders.batch import Batch
from letheon.loaders.order import share


@dataclass(frozen=True)
class Options:
    """What to time, and where the rows go."""

    only: tuple[str, ...] = ("search", "cka", "memory", "votes")
    """of search, cka, memory, votes"""
    samples: int = 60_000
    """of the training set whose outputs the ranks hold, where memory is measured"""
    rows: tuple[int, ...] = (2000, 8000, 32000, 128000)
    """of the database that is searched; the largest is timed once"""
    images: int = 10_000
    """of the CKA"""
    width: int = 2048
    """features"""
    repeats: int = 5
    """timed calls of each variant, after one of warm-up"""
    threads: int = 1
    """threads of torch on the CPU"""
    out: Path | None = None
    """CSV file to write; printed only, if not given"""


def bench_search(options: Options, results: Results, queries: int = 500) -> None:
    """k-NN at k = 200: the database grows; scikit-learn, FAISS and torch on the same vectors.

    What 1M rows and 10,000 queries take follows from the line through all sizes but the largest.
    """
    generator = torch.Generator().manual_seed(0)
    sizes, width, rows = options.rows, options.width, list[Row]()
    x = torch.randn(sizes[-1], width, generator=generator).relu_()
    q = torch.randn(queries, width, generator=generator).relu_()
    y, truth = (torch.randint(65, (len(v),), generator=generator) for v in (x, q))
    for n in sizes:
        near = x[:n], y[:n]

        def field(near: Any = near) -> float:
            classifier = KNeighborsClassifier(200, metric="cosine", algorithm="brute")
            return float(classifier.fit(near[0].numpy(), near[1].numpy()).score(q.numpy(), truth))

        def search(backend: Any, near: Any = near) -> object:
            return knn(near[0], near[1], q, truth, (1, 5, 10, 20, 200), backend=backend)

        variants: dict[str, Callable[[], object]] = {
            "ours, torch, five k": partial(search, "torch"),
        }
        if importlib.util.find_spec("faiss"):
            variants["ours, faiss"] = partial(search, "faiss")
        if n < sizes[-1]:
            variants["field, k = 200"] = field
            variants["ours, float64"] = partial(search, "torch-fp64")
        repeats = options.repeats if n < sizes[-1] else 1
        x_of = f"{n} x {width}, {queries} queries"
        rows += results.add(compare("knn", variants, repeats, 1, x=x_of))
    for variant in dict.fromkeys(r.variant for r in rows):
        times = [r.median for r in rows if r.variant == variant][: len(sizes) - 1]
        if len(times) > 1:
            slope, start = np.polyfit(sizes[:-1], times, 1, w=1 / np.array(times))
            seconds = (start + slope * 1e6) * 10_000 / queries / 1e3
            results.add([
                row("knn", variant, [seconds], metric="extrapolated time", unit="s",
                    x=f"1000000 x {width}, 10000 queries", device="cpu")
            ])  # fmt: skip


VOTES = ((500, 2000, 512), (2000, 10000, 512))  # queries, rows of the database, width
CLASSES = 65


def plain_votes(x: Tensor, y: Tensor, q: Tensor, k: int) -> Tensor:
    """The classes by one float32 product and `topk` (Wu et al. 2018), as most toolboxes do it."""
    bank = torch.nn.functional.normalize(x).T.contiguous()
    near, places = (torch.nn.functional.normalize(q) @ bank).topk(k, dim=1)
    weights = (near / 1e6).exp()  # so large a temperature counts each neighbor the same
    each = torch.nn.functional.one_hot(y[places], CLASSES) * weights[:, :, None]
    return each.sum(dim=1).argsort(dim=1, descending=True)[:, 0]


def _voters(
    database: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], k: int
) -> dict[str, Callable[[], Any]]:
    """Who answers, as (Q,) classes: ours, scikit-learn, `plain_votes`; lightly where installed."""
    (x, y), (q, truth) = database, queries
    unit = torch.nn.functional.normalize

    def by_sklearn() -> Any:
        classifier = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
        return classifier.fit(x.numpy(), y.numpy()).predict(q.numpy())

    voters: dict[str, Callable[[], Any]] = {
        "ours": lambda: knn(x, y, q, truth, (k,)).predictions[k],
        "scikit-learn": by_sklearn,
        "float32 and topk": lambda: plain_votes(x, y, q, k),
    }
    if importlib.util.find_spec("lightly"):
        lightly = importlib.import_module("lightly.utils.benchmarking.knn")
        voters["lightly"] = lambda: lightly.knn_predict(
            unit(q), unit(x).T.contiguous(), y, CLASSES, k, 1e6
        )[:, 0]
    return voters


def bench_votes(options: Options, results: Results) -> None:
    """One k, small sets about class centers, by processor time, which neighbors move less.

    A row of `agreement` is the share of our answers.
    """
    generator = torch.Generator().manual_seed(0)
    for queries, rows, width in VOTES:
        centers = torch.randn(CLASSES, width, generator=generator)
        labels = [torch.arange(count) % CLASSES for count in (rows, queries)]
        sets = [
            (centers[each] + 3 * torch.randn(len(each), width, generator=generator), each)
            for each in labels
        ]
        for k in (1, 5, 20, 200):
            voters, x_of = (
                _voters(sets[0], sets[1], k),
                f"{queries} of {rows}, width {width}, k = {k}",
            )
            times: dict[str, list[float]] = {name: [] for name in voters}
            for _ in range(options.repeats):
                for name, vote in voters.items():
                    vote()  # or it would pay for the memory that the one before gave back
                    start = time.process_time()
                    vote()
                    times[name].append((time.process_time() - start) * 1e3)
            results.add([row("knn votes", name, each, metric="processor", x=x_of, device="cpu")
                         for name, each in times.items()])  # fmt: skip
            ours = np.asarray(voters["ours"]())
            for name, vote in voters.items():
                same = float((np.asarray(vote()) == ours).mean())
                results.add([row("knn votes", name, [same], metric="agreement", unit="share",
                                 x=x_of, device="cpu")])  # fmt: skip


def bench_cka(options: Options, results: Results) -> None:
    """Exact CKA of stored features, and one side's own term, which is computed once a model."""
    generator = torch.Generator().manual_seed(0)
    n, width = options.images, options.width
    x, y = (torch.randn(n, width, generator=generator).relu() for _ in "xy")
    variants: dict[str, Callable[[], object]] = {
        "both sides": lambda: linear_cka(x, y),
        "own term": lambda: center("y", y),
    }
    results.add(compare("cka", variants, min(3, options.repeats), 0, x=f"{n} x {width}"))


class Zeros(torch.nn.Module):
    """A network whose answers cost nothing: outputs of this width and number of classes."""

    def __init__(self, width: int, classes: int = 100) -> None:
        """Take the sizes."""
        super().__init__()
        self.width, self.classes = width, classes

    def forward(self, images: Tensor) -> Output:
        """Answer each image with noise keyed by its number."""
        noise = torch.Generator().manual_seed(int(images[0, 0]))
        features = torch.randn(len(images), self.width, generator=noise)
        return Output(features[:, : self.classes].contiguous(), features)


class Numbers:
    """A loader whose images are their numbers, shared out as every loader does."""

    def __init__(self, count: int, ranks: Ranks) -> None:
        """Take the size of the set."""
        self.count, self.ranks = count, ranks

    def sweep(self, indices: object = None, skip: int = 0) -> Iterator[Batch]:
        """Yield this rank's share without its first batches."""
        place = share(self.count, self.ranks.rank, self.ranks.world)
        for part in torch.arange(place.start, place.stop).split(250)[skip:]:
            labels, forget = part % 10, part % 10 == 0
            yield Batch(part[:, None].float(), labels, forget, part, self.count)


def _grow(rank: int, world: int, file: str, options: Options, pipe: Any) -> None:
    """On one rank: evaluate, and send the growth of its largest memory in MB."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    ranks = Ranks(rank, world, rank)
    warm = extract(Zeros(32, 16), Numbers(500 * world, ranks), ranks)  # type: ignore[arg-type]
    measure(Passes("warm", {"train": warm, "test": warm, "domain/a": warm}), ranks=ranks)
    reset_peak()
    before, files = memory("VmRSS"), memory("RssFile")

    def grown() -> float:
        return memory("VmHWM") - before - (memory("RssFile") - files)

    net, read = Zeros(options.width), Numbers(options.samples, ranks)
    whole = extract(net, read, ranks)  # type: ignore[arg-type]
    after = grown()
    few = extract(net, Numbers(options.samples // 10, ranks), ranks)  # type: ignore[arg-type]
    passes = Passes("model", {"train": whole, "test": few, "domain/a": few})
    measure(passes, passes, ranks=ranks)
    pipe.send((after, grown()))
    dist.destroy_process_group()


def bench_memory(options: Options, results: Results) -> None:
    """Peak memory of a rank over 1, 2, 4 and 8 ranks: outputs alone, and with the quick metrics."""
    context = mp.get_context("spawn")
    for world in (1, 2, 4, 8):
        with tempfile.TemporaryDirectory() as folder:
            pipes = [context.Pipe() for _ in range(world)]
            processes = [
                context.Process(
                    target=_grow, args=(rank, world, f"{folder}/meet", options, pipes[rank][1])
                )
                for rank in range(world)
            ]
            for process, (_, there) in zip(processes, pipes, strict=True):
                process.start()
                there.close()  # so that a rank that fails ends the wait
            grown = [here.recv() for here, _ in pipes]
            for process in processes:
                process.join()
        x = f"{options.samples} x {options.width}, {world} ranks"
        for number, variant in enumerate(("outputs", "outputs and quick row")):
            values = [each[number] for each in grown]
            results.add([row("evaluation memory", variant, values, metric="peak growth of a rank",
                             unit="MB", x=x, device="cpu")])  # fmt: skip


BENCHES = {"memory": bench_memory, "search": bench_search, "cka": bench_cka, "votes": bench_votes}


def main(options: Options) -> None:
    """Run the benches; rows are written as they are measured."""
    torch.set_num_threads(options.threads)
    results = Results(options.out)
    for name in options.only:
        BENCHES[name](options, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
