"""How time and peak memory grow: with images, classes, parameters, ranks and layers compared.

    python benchmarks/bench_growth.py --out benchmarks/results/growth_cpu.csv

Each point runs in a process of its own, so that its peak memory is its own: the peak is what the
work added to the process before it. A curve's exponent is the slope of log(value) over log(x) by
least squares; that of n log n is 1.07 to 1.11 between 10^4 and 10^6. The exit code is 1 where time
or memory grows faster with the number of images than that, with a margin for noise.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from harness import Results, Row, row

from letheon.engine.distributed import Ranks, sum_over_ranks
from letheon.eval.metrics.cka import center, compare
from letheon.eval.metrics.knn import knn
from letheon.eval.metrics.knn_splits import split
from letheon.kernels.threshold import top_masks
from letheon.loaders.forget_request import Request, forget_mask
from letheon.loaders.order import epoch_parts

Work = Callable[[], object]
LIMIT = 1.3  # exponent in the number of images: n log n is 1.07 to 1.15, the rest is noise
LEAST = 4 * 2**20  # bytes: below it a peak is the allocator's, and is left out of the exponent


def order(n: int) -> Work:
    """One epoch's batches of n images, of which a tenth is to be forgotten."""
    forget = np.arange(n) % 10 == 0
    return lambda: [epoch_parts(r, forget, 256, 1, 0) for r in ("forget", "retain", "mixed")]


def plan(n: int) -> Work:
    """Which of n images a request means, and the k-NN split."""
    labels = np.arange(n) % 1000
    request = Request("", tuple(range(0, 1000, 10)), None, "", ())
    return lambda: (forget_mask(request, labels), split(n))


def cka_images(n: int) -> Work:
    """Exact CKA of two sets of 256 features of n images."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 256, generator=draw) for _ in range(2))
    return lambda: compare(center("x", x), center("y", y))


def knn_classes(n: int) -> Work:
    """k-NN votes over n classes: 4,000 images searched by 500."""
    draw = torch.Generator().manual_seed(0)
    x, q = torch.randn(4000, 128, generator=draw), torch.randn(500, 128, generator=draw)
    y, truth = torch.arange(4000) % n, torch.arange(500) % n
    return lambda: knn(x, y, q, truth)


def mask(n: int) -> Work:
    """A saliency mask over n parameters."""
    draw = torch.Generator().manual_seed(0)
    scores = [torch.randn(n // 10, generator=draw) for _ in range(10)]
    return lambda: top_masks(scores, [0.5])


def layers(n: int) -> Work:
    """All pairs of n layers of 64 features over 1,000 images."""
    draw = torch.Generator().manual_seed(0)
    sides = [[torch.randn(1000, 64, generator=draw) for _ in range(n)] for _ in range(2)]

    def work() -> object:
        left, right = ([center("layer", rows) for rows in side] for side in sides)
        return [compare(a, b) for a in left for b in right]

    return work


def ranks(n: int) -> Work:
    """The plan of one of n ranks over a million images."""
    forget = np.arange(10**6) % 10 == 0
    return lambda: epoch_parts("retain", forget, 1024, 1, 0, n - 1, n)


def reduce(n: int) -> Work:
    """Summing eleven million gradients over n processes, which is timed in the first."""
    gradients = [torch.ones(11_000_000)]
    world = Ranks(int(os.environ.get("RANK", "0")), n)
    if n > 1:
        torch.distributed.init_process_group("gloo")
    return lambda: sum_over_ranks(gradients, world)


@dataclass(frozen=True)
class Curve:
    """One axis: what grows, and where it is measured."""

    over: str
    make: Callable[[int], Work]
    points: tuple[int, ...]
    processes: bool = False  # x processes


IMAGES = (1_000, 10_000, 100_000, 1_000_000)
CURVES = {
    "order of an epoch": Curve("images", order, IMAGES),
    "request and split": Curve("images", plan, IMAGES),
    "exact CKA": Curve("images", cka_images, (1_000, 10_000, 100_000)),
    "k-NN votes": Curve("classes", knn_classes, (10, 100, 1_000)),
    "saliency mask": Curve("parameters", mask, (100_000, 1_000_000, 10_000_000, 25_000_000)),
    "CKA of all pairs": Curve("layers", layers, (4, 8, 16)),
    "plan of one rank": Curve("ranks", ranks, (1, 2, 8)),
    "sum of gradients": Curve("ranks", reduce, (2, 3, 4), True),
}


@dataclass(frozen=True)
class Options:
    """Where to write, and how often to measure."""

    out: Path = Path("benchmarks/results/growth_cpu.csv")
    repeats: int = 3
    """Timed calls of each point, after one that is not timed."""
    only: tuple[str, ...] = ()
    """Curves to draw; all, if not given."""
    point: tuple[str, int] | None = None
    """For this script's own processes: measure one point and print it."""


def peak() -> int:
    """Bytes: the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, x: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call and the bytes that the first one added to the peak."""
    work = CURVES[name].make(x)
    before = peak()
    work()
    added = peak() - before
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return {"time": times, "memory": [float(added)]}


def in_process(name: str, x: int, repeats: int) -> dict[str, list[float]]:
    """`measure` in a process of its own, or in x of them."""
    launch = [sys.executable]
    if CURVES[name].processes and x > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={x}"]
    command = [*launch, __file__, "--repeats", str(repeats), "--point", name, str(x)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return values


def exponent(points: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log(value) over log(x), by least squares."""
    return float(np.polyfit(np.log(points), np.log(values), 1)[0])


def point_rows(name: str, x: int, point: dict[str, list[float]]) -> list[Row]:
    """The rows of one point of a curve."""
    return [
        row(name, "ours", point[metric], metric=metric, unit=unit, mode=CURVES[name].over, x=x,
            device="cpu")
        for metric, unit in (("time", "s"), ("memory", "bytes"))
    ]  # fmt: skip


def exponent_rows(name: str, points: dict[int, dict[str, list[float]]]) -> list[Row]:
    """The exponents of one curve, where there are enough points."""
    rows = []
    for metric in ("time", "memory"):
        least = LEAST if metric == "memory" else 0.0
        medians = {x: float(np.median(point[metric])) for x, point in points.items()}
        # The smallest points are overhead, not growth: the slope is of the last three.
        large = [(x, median) for x, median in medians.items() if median > least][-3:]
        if len(large) > 1:
            rows.append(
                row(name, "ours", [exponent(*zip(*large, strict=True))],
                    metric=f"{metric} exponent", unit="", mode=CURVES[name].over, device="cpu")
            )  # fmt: skip
    return rows


def main(options: Options) -> int:
    """Measure the curves, write each point as it is there, and say which grow too fast."""
    if options.point is not None:
        values = measure(*options.point, options.repeats)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(values))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return 0
    results = Results(options.out)
    for name in options.only or CURVES:
        points: dict[int, dict[str, list[float]]] = {}
        for x in CURVES[name].points:
            points[x] = in_process(name, x, options.repeats)
            results.add(point_rows(name, x, points[x]))
        results.add(exponent_rows(name, points))
    exponents = [r for r in results.rows if r.mode == "images" and "exponent" in r.metric]
    fast = [r for r in exponents if r.median > LIMIT]
    for r in fast:
        print(f"{r.name}: {r.metric} {r.median} in the number of images, over {LIMIT}")
    return int(bool(fast))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
