"""Passes over a part of the training set, and other rounds, by a name to be resumed by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, TypeVar

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.checkpoints.sweep_state import Sums
from letheon.engine.memory.shards import blank_pass, even_rounds
from letheon.engine.method import Loss, Run
from letheon.engine.models.classifier import Classifier
from letheon.kernels.keyed import permutation
from letheon.loaders.batch import Batch, Loader
from letheon.loaders.order import sweep_rounds

Part = Literal["forget", "retain", "all"]
T = TypeVar("T")


def batches(
    run: Run,
    part: Part,
    name: str = "",
    sums: Sums | None = None,
    samples: int | None = None,
    blank: Callable[[Classifier], object] = blank_pass,
) -> Iterator[Batch]:
    """Yield this rank's samples of a part of the training set, on the device, test transform.

    Args:
        run: the run.
        part: which training samples.
        name: what is added up, with all that it depends on besides weights and samples.
        sums: what the pass adds up, so that a preparation that is stopped goes on in its middle;
            None: it reads all again.
        samples: at most so many of them, drawn by the run's seed; None: all.
        blank: what a rank without a batch does of a network that is split over the ranks, while
            another has one.
    """
    if part == "all":
        indices = list(range(len(run.forget)))
    else:
        mask = run.forget if part == "forget" else ~run.forget
        indices = mask.nonzero().flatten().tolist()
    if samples is not None and samples < len(indices):
        order = permutation(run.seed, "statistics", 0, len(indices))[:samples]
        indices = sorted(indices[i] for i in order.tolist())
    rounds = sweep_rounds(len(indices), run.recipe.batch_size, run.ranks.world)

    def read(skip: int) -> Iterator[Batch | None]:
        own = sweep(run, run.loader, indices, skip)
        return own if run.shards is None else even_rounds(own, rounds - skip)

    whole = f"{name}, {samples} samples"
    for batch in read(0) if sums is None else repeat(run, part, whole, sums, read, rounds):
        if batch is None:  # another rank has one more
            blank(run.model)
        else:
            yield batch.to(run.ranks.device)


def repeat(
    run: Run, part: Part, name: str, sums: Sums, items: Callable[[int], Iterator[T]], rounds: int
) -> Iterator[T]:
    """Yield the items of rounds that add something up, so that a stopped preparation resumes them.

    Args:
        run: the run; where nothing saves its preparation, all items come.
        part: which training samples the sums depend on.
        name: what is added up, with all that it depends on besides weights and samples.
        sums: what the rounds have come to, this rank's.
        items: items(skip), this rank's without the first ones; within each may lie other rounds.
        rounds: items of the rank that has the most of them, equal on every rank.
    """
    if run.sweeps is None:
        return items(0)
    return run.sweeps.watch(sweep_name(run, name, part), sums, items, rounds)


def sweep(
    run: Run, loader: Loader, indices: list[int] | None = None, skip: int = 0
) -> Iterator[Batch]:
    """Yield what `loader.sweep` yields, from images that the runs of a call keep, if they do."""
    if run.image_memory is None:
        return loader.sweep(indices, skip)
    return run.image_memory.sweep(loader, indices, skip)


def sweep_name(run: Run, what: str, part: Part) -> str:
    """Return a digest of all that a sum depends on, but for the images themselves."""
    known = (
        what, part, weights_digest(run.model), run.model.preset, tuple(run.named_parameters),
        run.forget.tolist(), run.precision.dtype, run.recipe.batch_size, run.ranks.world, run.seed,
        *(["split"] if run.shards is not None else []),
    )  # fmt: skip
    return hashlib.sha256(repr(known).encode()).hexdigest()


def loss_name(loss: Loss) -> str:
    """Return the name of a loss, its options included, in every process."""
    if isinstance(loss, partial):
        return f"{loss_name(loss.func)} {loss.args} {sorted(loss.keywords.items())}"
    return f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"
