"""Dry runs: what each rank of a job of any size would read and hold, and what the job refuses.

Nothing is written, no other process is started, and no step is taken: the plan follows from
settings, labels and sizes. What a method prepares (teachers, masks, statistics) is made of a few
images, since the passes it asks for do not depend on their numbers.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks
from letheon.engine.method import Method, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.runs.plan import Plan, check_knowledge, row_bytes
from letheon.engine.runs.several import NamedPlan, peak_bytes
from letheon.engine.step import check_sync
from letheon.errors import InputError
from letheon.loaders.batch import Batch, Loader, Reads, Stream
from letheon.loaders.order import share, stream_sizes

MOST = 512  # ranks
FEW = 8  # images of each kind that a method's preparation sees
GIB = 2**30


class PassPlan(NamedTuple):
    """One phase of one epoch, over all ranks; images are those of the phase and of that beside."""

    epoch: int
    phase: str
    reads: Reads
    steps: int
    images: int  # of all ranks
    rank_images: tuple[int, ...]  # of each rank
    last: tuple[int, ...]  # global sizes of the last two batches
    first_rate: float
    last_rate: float


@dataclass(frozen=True)
class RunPlan:
    """What a run would do on `world` ranks."""

    method: str
    world: int
    passes: tuple[PassPlan, ...]
    reduced_bytes: int  # of gradients that are averaged over the ranks in a step
    state_bytes: int  # weights, optimizer and what the method may keep, at most
    row_bytes: int  # of these what it keeps of the rank's share of the forget samples
    activation_bytes: int  # of the largest part of a batch on one rank; 0: not known
    split: bool = False  # the network's weights are, over the ranks


class FewImages(Loader):
    """A loader of a few images of each kind: what a preparation needs to say its passes.

    They are of as many classes as can be: some methods refuse a set that keeps a single one.
    """

    def __init__(self, loader: Loader, forget: Tensor, labels: NDArray[np.int64]) -> None:
        self._loader = loader
        flags = forget.cpu().numpy()
        self._few: set[int] = set()
        for kind in (np.flatnonzero(flags), np.flatnonzero(~flags)):
            firsts = kind[np.unique(labels[kind], return_index=True)[1]]
            self._few |= {*np.r_[firsts, np.setdiff1d(kind, firsts)][:FEW].tolist()}

    def train(self, stream: Stream | Reads, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The first batch alone."""
        for batch in self._loader.train(stream, epoch, skip):
            yield batch
            return

    def steps(self, stream: Stream | Reads) -> int:
        """As the whole set has."""
        return self._loader.steps(stream)

    def sweep(self, indices: Sequence[int] | None = None, skip: int = 0) -> Iterator[Batch]:
        """Those of `indices` that are among the few."""
        few = sorted(self._few if indices is None else self._few & set(indices))
        return self._loader.sweep(few, skip)


def plan_run(plan: Plan, method: Method, device: torch.device, world: int) -> RunPlan:
    """Plan a run whose input has been checked, on `world` ranks; its model is left as it was.

    Raises:
        InputError: what the job would refuse.
        RunFailed: what it would refuse before its first step.
    """
    alone = plan.run(Ranks(device=device))
    check_knowledge(plan, method, alone)
    few = FewImages(alone.loader, alone.forget, plan.split[0].train.labels)
    run = replace(alone, model=copy.deepcopy(alone.model), loader=few)
    if not next(run.model.parameters()).is_meta:
        run.precision.apply(run.model, device)
    state = method.prepare(run) or State()
    check_sync(method, replace(run, ranks=Ranks(world=world, device=device)), state)
    passes = [
        one
        for epoch in range(run.recipe.epochs)
        for phase in method.phases(run, state, epoch)
        for one in _plan_passes(method, run, phase, epoch, world)
    ]
    phases = method.phases(run, state, 0) if passes else []
    parts = max((len(phase.parts) for phase in phases), default=0)
    wire = 2 if run.precision.wire == "bf16" and not parts else 4
    recipe = plan.recipe.divide_batch(world)
    unit = max(1, recipe.batch_norm_group)
    units_of_rank = -(-_largest_batch(phases, recipe.batch_size) // unit // world)
    rows = unit * -(-units_of_rank // recipe.grad_accum_steps)
    return RunPlan(
        method.name, world, tuple(passes),
        sum(p.numel() for p in run.parameters) * wire * max(parts, 1) * (world > 1),
        peak_bytes(NamedPlan("", method, plan, alone, Path()), world),
        row_bytes(method, alone, world),
        count_activations(run.model, rows), run.precision.reduction(world) == "shard",
    )  # fmt: skip


def _largest_batch(phases: Sequence[Phase], batch_size: int) -> int:
    """Images of the largest global batch of one step; a paired one has as many of either kind."""
    each = [one for phase in phases for one in (phase, phase.beside) if one is not None]
    return max(
        ((one.batch_size or batch_size) * (2 if one.reads == "paired" else 1) for one in each),
        default=0,
    )


def _plan_passes(
    method: Method, run: Run, phase: Phase, epoch: int, world: int
) -> Iterator[PassPlan]:
    """Yield the pass over a phase, and that over the one beside it."""
    forget = run.forget.cpu().numpy()
    steps = len(stream_sizes(phase.stream, _flags(method, run, phase), run.recipe.batch_size))
    others = -(-steps // phase.every)
    for one in (phase, phase.beside):
        if one is None:
            continue
        stream = run.stream(one)
        stream = stream if one is phase else stream._replace(share=1.0, steps=others)
        flags = forget if one.source == "train" else _flags(method, run, one)
        sizes = stream_sizes(stream, flags, run.recipe.batch_size)
        halves = 2 if one.reads == "paired" else 1
        rates = [method.rate(run, one.slot, epoch + k / len(sizes)) for k in (0, len(sizes) - 1)]
        yield PassPlan(
            epoch, one.name, one.reads, len(sizes), halves * sum(sizes),
            tuple(halves * n for n in share_out(sizes, world, stream.group)), tuple(sizes[-2:]),
            *rates,
        )  # fmt: skip


def _flags(method: Method, run: Run, phase: Phase) -> NDArray[np.bool_]:
    if phase.source == "train":
        return run.forget.cpu().numpy()
    return np.zeros(len(method.sources(run)[phase.source]), np.bool_)


def share_out(sizes: Sequence[int], world: int, group: int = 0) -> list[int]:
    """Count the samples that each rank reads of global batches of these sizes, in whole groups."""
    totals = [0] * world
    for size, times in Counter(sizes).items():
        for rank in range(world):
            part = share(size, rank, world, group)
            totals[rank] += times * (part.stop - part.start)
    return totals


def count_activations(model: Classifier, rows: int) -> int:
    """Count the bytes that a float32 forward pass keeps for the backward pass; no number is
    computed. 0 where the network cannot run without numbers."""  # noqa: D205, D209
    if not rows:
        return 0
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    net = copy.deepcopy(model).to("meta").train()
    size = model.preset.size
    images = torch.empty(rows, 3, size, size, device="meta")
    weights = sum(t.numel() * t.element_size() for t in net.parameters())
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(images)
    except (RuntimeError, NotImplementedError):
        return 0
    del out
    return max(sum(kept.values()) - weights, 0)


def as_text(run: RunPlan) -> str:
    """Return the plan as lines: a phase of equal epochs once."""
    lines = [f"{run.method} on {run.world} rank{'s' * (run.world > 1)}:"]
    groups: dict[tuple[object, ...], list[PassPlan]] = {}
    for one in run.passes:
        groups.setdefault((one.phase, one.steps, one.images, one.rank_images), []).append(one)
    for group in groups.values():
        first, last = group[0], group[-1]
        span = f"epoch {first.epoch + 1}" + f" to {last.epoch + 1}" * (last.epoch > first.epoch)
        lines.append(
            f"  {span}, phase {first.phase} ({first.reads}): {first.steps} steps an epoch, "
            f"{first.images} images ({min(first.rank_images)} to {max(first.rank_images)} a rank), "
            f"last batches {', '.join(map(str, first.last))}, "
            f"rate {first.first_rate:g} at the start, {last.last_rate:g} at the end"
        )
    if not run.passes:
        lines.append("  no steps: its work is done before the first")
    count = f"{run.reduced_bytes / 1e6:.2f} MB"
    if run.split:
        lines.append(
            f"  split over the ranks: {count} of weights are gathered block by block, twice a "
            "step, and as much of gradient is reduced"
        )
    else:
        lines.append(f"  all-reduce of {count} a step")
    rows = ""
    if run.row_bytes:
        rows = f" ({run.row_bytes / GIB:.3f} of its share of the forget samples)"
    lines.append(
        f"  memory a rank, at most: {run.state_bytes / GIB:.2f} GiB of weights, gradient, "
        f"optimizer and what the method keeps{', with the blocks that are gathered' * run.split}"
        f"{rows}, and {run.activation_bytes / GIB:.2f} GiB of "
        "activations in float32"
    )
    return "\n".join(lines)


def describe_sweeps(
    name: str, sets: Mapping[str, int], world: int, values: int = 0, weights: int = 0
) -> str:
    """Return lines on passes that read each image of some sets once.

    Args:
        name: what reads them.
        sets: the images of each.
        world: ranks.
        values: float32 numbers of an image that are held, on the rank that read it.
        weights: bytes of the networks that the host of a rank holds at once, at most.
    """
    lines = [f"{name} on {world} rank{'s' * (world > 1)}:"]
    most = 0
    for key, count in sets.items():
        parts = share_out([count], world)
        most += max(parts)
        lines.append(f"  {key}: {count} images ({min(parts)} to {max(parts)} a rank)")
    if values:
        held = 4 * values * most
        lines.append(f"  outputs in memory a rank, at most: {held / GIB:.3f} GiB in float32")
    if weights:
        lines.append(
            f"  networks in memory of each rank's host, at most: {weights / 2**20:,.1f} MiB a rank"
        )
    return "\n".join(lines)


def check_world(world: int, ranks: Ranks) -> Ranks:
    """Return the first rank of `world`, for the checks that every job makes.

    Raises:
        InputError: more ranks than are planned for, or several processes were started.
    """
    if not 1 <= world <= MOST:
        raise InputError(f"got {world} ranks to plan for; expected 1 to {MOST}", option="dry_run")
    if ranks.world > 1:
        raise InputError(
            f"got {ranks.world} processes for a dry run; expected one; start it without a launcher",
            option="dry_run",
        )
    return Ranks(world=world, device=ranks.device)
