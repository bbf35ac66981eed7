"""Peak memory of a rank in training over 1, 2, 4 and 8 ranks, and what follows for more.

    cd benchmarks && python -m many_ranks.bench_ranks --out results/ranks_cpu.csv
    nice -n 19 python -m many_ranks.bench_ranks --out results/ranks_cpu.csv --append --worlds 64

The global batch stays. Ranks are forked from one process that has imported everything, so that 64
of them fit in a small memory: what is measured is what each has for itself from joining the others
to its last step, the peak of its resident memory beyond that at the fork, without pages of files.
The estimate is `fixed + share / ranks` by least squares over the worlds that were measured; a world
that is measured by itself gets none. With batch-norm groups the loss, which is written too, must be
that of one rank; the exit code is 1 where it is not, to 2e-5.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # before the fork: else each rank has its own, 150 MB of code
import tyro
from harness import Results, Row, memory, reset_peak, row

from letheon.engine.distributed import join_ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Run
from letheon.engine.models.classifier import build
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.methods.finetune import Finetune

TOLERANCE = 2e-5
_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: tensors that are freed go back to the system, so that the peak is in use."""


@dataclass(frozen=True)
class Options:
    """How large the training is, and on how many ranks."""

    out: Path = Path("results/ranks_cpu.csv")
    """Results file (CSV)."""
    append: bool = False
    """Add to the file."""
    worlds: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of ranks."""
    estimate: int = 64
    """Ranks that are estimated from those measured."""
    model: str = "resnet20"
    batch: int = 128
    """Images of a global batch."""
    steps: int = 3
    group: int = 2
    """Images of a batch-norm group."""
    again: bool = False
    """Compute activations again in the backward pass."""


def train(options: Options) -> float:
    """Train on the ranks that the environment names; the mean loss, equal on all."""
    losses: list[float] = []
    count = options.batch * options.steps
    with join_ranks("cpu") as ranks:
        model = build(options.model, 10)
        size = model.preset.size
        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        names = [str(k) for k in range(10)]
        images = ArrayImages("noise", pixels, np.arange(count, dtype=np.int64) % 10, names)
        forget = np.zeros(count, dtype=np.bool_)
        recipe = Recipe(
            1,
            batch_size=options.batch,
            batch_norm_group=options.group,
            activation_checkpoint=options.again,
        )
        reader = Reader(0, ranks.rank, ranks.world)
        loader = TorchLoader(images, forget, model.preset, options.batch, reader)
        run = Run(model, loader, recipe, ranks, 0, torch.from_numpy(forget), ())
        run.precision = Precision("fp32")
        run_method(Finetune(recipe), run, lambda kind, **of: losses.append(of.get("loss", 0.0)))
    return losses[-1]


def work(rank: int, world: int, port: int, options: Options, pipe: Connection) -> None:
    """On one rank: train, and send the growth of its largest memory in MB, and the loss."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        **{name: str(value) for name, value in place.items()},
    }
    reset_peak()
    before, files = memory("VmRSS"), memory("RssFile")
    loss = train(options)
    pipe.send((memory("VmHWM") - before - (memory("RssFile") - files), loss))


def measure(world: int, options: Options) -> tuple[list[float], float]:
    """MB of each rank, and the loss of the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = get_context("fork")
    pipes, ranks = [], []
    for rank in range(world):
        here, there = fork.Pipe()
        pipes.append(here)
        ranks.append(fork.Process(target=work, args=(rank, world, port, options, there)))
        ranks[-1].start()
        there.close()
    answers: list[Any] = [pipe.recv() for pipe in pipes]
    for process in ranks:
        process.join()
    return [megabytes for megabytes, _ in answers], answers[0][1]


def estimate(worlds: Sequence[int], megabytes: Sequence[float], world: int) -> float:
    """MB of a rank of `world`: what is there on every rank, and its share of the rest."""
    shares = np.stack([np.ones(len(worlds)), 1 / np.asarray(worlds)], axis=1)
    fixed, share = np.linalg.lstsq(shares, np.asarray(megabytes), rcond=None)[0]
    return float(fixed + share / world)


def row_of(
    options: Options,
    world: int,
    variant: str,
    values: Sequence[float],
    metric: str = "peak growth of a rank",
    unit: str = "MB",
) -> Row:
    """One row of a world."""
    x = f"{options.model} b{options.batch}, {world} ranks"
    return row("memory of a training", variant, values, metric=metric, unit=unit, mode="step", x=x,
               device="cpu")  # fmt: skip


def main(options: Options) -> int:
    """Measure one world after the other, and write after each."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)
    results = Results(options.out, options.append)
    medians: list[float] = []
    losses: list[float] = []
    variant = "measured, activation checkpoint" if options.again else "measured"
    for world in options.worlds:
        megabytes, loss = measure(world, options)
        medians.append(float(np.median(megabytes)))
        losses.append(loss)
        results.add(
            [
                row_of(options, world, variant, megabytes),
                row_of(options, world, variant, [loss], "mean loss", ""),
            ]
        )
    if len(medians) > 1:
        value = estimate(options.worlds, medians, options.estimate)
        results.add([row_of(options, options.estimate, "estimate", [value])])
    return int(max(losses) - min(losses) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
