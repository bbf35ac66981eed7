"""Estimates: images/s, memory, hours and disk of a planned job from a probe of a few steps.

    t(b) = fixed + image * b + exposed all-reduce

`fixed` is what a step costs however small its batch (launches, optimizer), `image` what an image
costs. Both follow from two batch sizes at least four times apart on the machine itself; from sizes
closer together, or from the network alone, the published figures are missed by 20 to 45 %.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from letheon.engine.distributed import Ranks, sum_over_ranks
from letheon.engine.loop import Seconds, passes
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.recipe import Recipe
from letheon.engine.runs.plan import JobOptions
from letheon.engine.runs.several import NamedPlan, peak_bytes
from letheon.errors import InputError
from letheon.launch.api import plan_training
from letheon.launch.planning.dry_run import count_activations
from letheon.methods.train import Train

STEPS, WARMUP = 20, 3
APART = 4  # times, at least, between the batch sizes of a probe
LATENCY = 5e-6  # seconds of one message between nodes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by the images of one rank."""

    fixed: float
    image: float

    @staticmethod
    def fit(small: tuple[int, float], large: tuple[int, float]) -> StepTime:
        """Fit two (images of a rank, seconds of a step).

        Raises:
            InputError: they are not `APART` times apart.
        """
        if large[0] < APART * small[0]:
            raise InputError(
                f"got probes of {small[0]} and {large[0]} images; expected sizes at least {APART} "
                "times apart, else the fixed cost of a step is not known"
            )
        image = max(large[1] - small[1], 0.0) / (large[0] - small[0])
        return StepTime(max(small[1] - image * small[0], 0.0), image)

    def seconds(self, images: float, exposed: float = 0.0) -> float:
        """Seconds of a step on `images` of a rank, with what its all-reduce does not hide."""
        return self.fixed + self.image * images + exposed


def reduce_seconds(count: int, nodes: int, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of `count` bytes over nodes of `bandwidth` bytes/s."""
    if nodes == 1:
        return 0.0
    return 2 * (nodes - 1) / nodes * count / bandwidth + 2 * math.log2(nodes) * LATENCY


@dataclass(frozen=True)
class JobForecast:
    """The job that --estimate predicts: training of a model on the images of --data."""

    model: str = "resnet50"
    """Architecture of the planned job."""
    batch_size: int = 256
    """Images of its global batch."""
    epochs: int = 10
    """Passes over the training images."""
    nodes: int = 1
    """Nodes like this one, on which the doctor is started as the job will be."""
    bandwidth: float = 10.0
    """GB/s between two nodes."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("batch_size", "epochs", "nodes"):
            if getattr(self, name) < 1:
                raise InputError(f"got {getattr(self, name)}; expected 1 or more", option=name)
        if not self.bandwidth > 0:
            raise InputError(f"got {self.bandwidth} GB/s; expected more", option="bandwidth")


def estimate(
    job: JobForecast, data: str, device: Literal["auto", "cpu", "cuda"], ranks: Ranks
) -> Iterator[str]:
    """Probe two batch sizes on every rank, and yield what follows for the planned job.

    Every rank must call. The all-reduce between nodes is taken to hide nothing behind the backward
    pass: DDP's buckets do better.

    Raises:
        InputError: as the job itself would, or a batch of fewer images than ranks.
    """
    world = ranks.world * job.nodes
    if job.batch_size < world:
        raise InputError(
            f"got a batch of {job.batch_size} images for {world} ranks; expected one each",
            option="batch_size",
        )
    options = JobOptions(data=data, device=device)
    images = options.open_data()
    model = build(job.model, len(images.classes), 0)
    model.class_names = images.classes
    share = -(-job.batch_size // world)
    sizes = (share // APART, share) if share >= APART else (share, share * APART)
    probes = [_probe(options, model, size, ranks) for size in sizes]
    times = StepTime.fit(*((n, seconds) for n, seconds in zip(sizes, probes, strict=True)))
    count = 4 * sum(p.numel() for p in model.parameters())
    exposed = reduce_seconds(count, job.nodes, 1e9 * job.bandwidth)
    seconds = times.seconds(share, exposed)
    total = len(images.train)
    steps = -(-total // job.batch_size) * job.epochs
    recipe = Recipe(epochs=job.epochs, batch_size=job.batch_size)
    plan, run = plan_training(options, Train(recipe), model, images, ranks)
    kept = peak_bytes(NamedPlan("", Train(recipe), plan, run, Path()))
    memory = kept + count_activations(model, share)
    yield (
        f"a step in {run.precision.dtype} takes {1e3 * times.fixed:.2f} ms and "
        f"{1e6 * times.image:.1f} us an image (probes of {sizes[0]} and {sizes[1]} images a rank), "
        f"{1e3 * exposed:.2f} ms of all-reduce"
    )
    yield f"{job.batch_size / seconds:.0f} images/s on {world} ranks of {job.nodes} nodes"
    yield f"{steps * seconds / 3600:.3f} hours for {job.epochs} epochs of {total} images"
    disk = 3 * count / 2**30  # the weights, and a saved state with the optimizer's
    yield f"{memory / 2**30:.2f} GiB a rank in float32, at most; {disk:.2f} GiB of disk"
    if world > 1:
        run.precision = replace(run.precision, reduce="shard")
        kept = peak_bytes(NamedPlan("", Train(recipe), plan, run, Path()), world)
        memory = kept + count_activations(model, share)
        yield f"{memory / 2**30:.2f} GiB a rank with reduce shard, which splits the network"


def _probe(options: JobOptions, model: Classifier, size: int, ranks: Ranks) -> float:
    """Seconds of a step, data and all-reduce of this node included, the mean over the ranks."""
    recipe = Recipe(epochs=1, batch_size=size * ranks.world)
    own = copy.deepcopy(model)
    run = plan_training(options, Train(recipe), own, options.open_data(), ranks)[1]
    one = next(passes(Train(recipe), run, Seconds(), lambda *_, **__: None))
    one.begin()
    started, count = time.perf_counter(), 0
    for batch, other in islice(one.batches(), WARMUP + STEPS):
        one.take(batch, other)
        count += 1
        if count == WARMUP:
            _synchronize(ranks)
            started = time.perf_counter()
    _synchronize(ranks)
    if count <= WARMUP:
        raise InputError(
            f"got {count} batches of {recipe.batch_size} images; expected more than {WARMUP}; "
            "estimate a smaller batch or a larger set",
            option="batch_size",
        )
    mean = torch.tensor([(time.perf_counter() - started) / (count - WARMUP)], dtype=torch.float64)
    sum_over_ranks([mean], ranks)
    return float(mean) / ranks.world


def _synchronize(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
