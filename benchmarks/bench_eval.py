"""k-NN and CKA of stored features: ours beside scikit-learn and FAISS, on random numbers.

    python benchmarks/bench_eval.py --out benchmarks/results/eval_cpu.csv

What is timed does not depend on the numbers. A whole evaluation beside the field's way is the job
"evaluation" of bench_end_to_end.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from harness import Results, Row, compare, row
from sklearn.neighbors import KNeighborsClassifier

from letheon.eval.metrics.cka import center, linear_cka
from letheon.eval.metrics.knn import knn


@dataclass(frozen=True)
class Options:
    """What to time, and where the rows go."""

    only: tuple[str, ...] = ("search", "cka")
    """of search, cka"""
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


BENCHES = {"search": bench_search, "cka": bench_cka}


def main(options: Options) -> None:
    """Run the benches; rows are written as they are measured."""
    torch.set_num_threads(options.threads)
    results = Results(options.out)
    for name in options.only:
        BENCHES[name](options, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
