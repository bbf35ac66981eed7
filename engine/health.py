"""Is the network still one: finite weights, and an accuracy above chance."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from letheon.engine.distributed import sum_over_ranks
from letheon.engine.memory.shards import keep_pace, own_part
from letheon.engine.method import Accuracies, Phase, Run
from letheon.engine.numbers.sweep import sweep
from letheon.errors import LetheonError, RunFailed, join_few
from letheon.loaders.batch import Batch, Loader
from letheon.progress import say

SAMPLES = 1_000
"""Retain images that the look for a collapse reads, at most."""
SHARE = 100
"""A look within a run reads one retain image in so many, at most."""
SHARE_AT_END = 10
"""The look at the end reads one in so many, which is little beside an epoch of training."""
FEWEST = 100
"""Images that a look reads, at least, to be worth its word, where there are so many."""


def check_finite(run: Run, moment: str) -> None:
    """Refuse weights and buffers that are not finite; looked for on the device, read once.

    The weights are equal on every rank, so that every rank comes to the same end.

    Raises:
        RunFailed: with the names of the tensors and how many numbers of them are broken.
    """
    tensors = {k: v for k, v in run.model.state_dict().items() if v.is_floating_point()}
    broken = torch.stack([(~own_part(value).isfinite()).sum() for value in tensors.values()])
    if run.shards is not None:
        counts_once = [hasattr(v, "device_mesh") or run.ranks.main for v in tensors.values()]
        broken *= torch.tensor(counts_once, device=broken.device)  # a buffer is whole on each rank
        sum_over_ranks([broken], run.ranks)
    if not bool(broken.any()):
        return
    counts = dict(zip(tensors, broken.tolist(), strict=True))
    odd = [name.removeprefix("net.") for name, count in counts.items() if count]
    raise RunFailed(
        f"got {sum(counts.values())} numbers that are not finite {moment}, in the weights "
        f"{join_few(odd)}; expected finite numbers; {_mend(run)}"
    )


def _mend(run: Run) -> str:
    """Say what to change: a method that takes no steps has no rate to lower."""
    return "lower lr or epochs" if run.recipe.epochs else "choose weaker settings of the method"


def measure_accuracies(run: Run, which: Literal["all", "forget", "none"] = "all") -> Accuracies:
    """Top-1 accuracy over training and held-out images; the model's mode stays as it was.

    Args:
        run: the run.
        which: forget reads the forget set's training images alone; none reads none.
    """
    if which == "none":
        return Accuracies(None, None, None, None)
    if which == "forget":
        indices = run.forget.nonzero().flatten().tolist()
        return Accuracies(measure_pair(run, run.loader, indices)[0], None, None, None)
    held_out = (None, None) if run.held_out is None else measure_pair(run, run.held_out())
    return Accuracies(*measure_pair(run, run.loader), *held_out)


def measure_pair(
    run: Run, loader: Loader, indices: list[int] | None = None
) -> tuple[float | None, float | None]:
    """Top-1 accuracy of the run's model over a loader's forget and other samples; None of none.

    `indices` are the samples that are read; default: all.
    """
    counts = torch.zeros(2, 2, dtype=torch.float64, device=run.ranks.device)
    for right, flags, _ in _answers(run, loader, indices):
        of = torch.stack([flags, ~flags])
        counts += torch.stack([(right & of).sum(dim=1), of.sum(dim=1)], dim=1)
    sum_over_ranks([counts], run.ranks)
    forget, others = (hits / samples if samples else None for hits, samples in counts.tolist())
    return forget, others


def watch_collapse(run: Run, log: Callable[..., None], moment: str) -> bool:
    """After an epoch with another to come: whether the network has collapsed; then it is said.

    Read are `SAMPLES` retain images, at most; without `on_collapse` stop one in `SHARE`, at most,
    and none where that is fewer than `FEWEST`. Every rank must call.

    Raises:
        RunFailed: on every rank, where `on_collapse` is stop.
    """
    stops = run.recipe.on_collapse == "stop"
    images = int((~run.forget).sum())
    count = min(SAMPLES, images if stops else images // SHARE)
    if count < FEWEST and not stops:
        return False
    text, seen = _look(run, count)
    if text is None or not seen:  # what could not be read is told at the end
        return False
    if stops:
        raise RunFailed(f"got this {moment}: {text}, or take on_collapse warn, which goes on")
    log("warning", text=f"{moment}: {text}")
    if run.ranks.main:
        say(f"warning: {moment}: {text}; on_collapse stop ends such a run")
    return True


def collapse_warning(run: Run) -> str | None:
    """A line about a network that does no better on retain images than naming one class always.

    One retain image of the training set in `SHARE_AT_END`, `FEWEST` to `SAMPLES` of them, evenly
    spread over it, in evaluation mode; the same on every rank. Another line where they could not be
    read.
    """
    images = int((~run.forget).sum())
    return _look(run, min(SAMPLES, max(FEWEST, images // SHARE_AT_END)))[0]


def _look(run: Run, most: int) -> tuple[str | None, bool]:
    """Say whether the network collapsed, by `most` images at most; and whether they were read."""
    retain = (~run.forget).nonzero().flatten()
    rows = torch.linspace(0, len(retain) - 1, min(len(retain), most)).long()
    counts = torch.zeros(run.model.classes + 1, dtype=torch.float64, device=run.ranks.device)
    failures = torch.zeros((), dtype=torch.float64, device=run.ranks.device)
    try:
        for right, _, labels in _answers(run, run.loader, retain.cpu()[rows].tolist()):
            counts[-1] += right.sum()
            counts[:-1] += torch.bincount(labels, minlength=run.model.classes)
    except (LetheonError, OSError) as error:  # the model is trained, and must not be lost
        failures += 1
        print(f"warning: rank {run.ranks.rank}: {' '.join(str(error).split())}", file=sys.stderr)
    sum_over_ranks([counts, failures], run.ranks)
    if failures:
        text = "whether the network collapsed was not looked at: images could not be read any more"
        return text, False
    hits, samples = float(counts[-1]), float(counts[:-1].sum())
    largest = float(counts[:-1].max())
    if samples in (0, largest):
        return None, True  # nothing read, or one class only, which always naming it gets right
    chance, accuracy = largest / samples, hits / samples
    if accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / samples):
        return None, True
    text = (
        f"the network collapsed: its accuracy on {int(samples)} retain images is {accuracy:.1%}, "
        f"and naming one class always gives {chance:.1%}; {_mend(run)}"
    )
    return text, True


Answers = list[tuple[Tensor, Tensor, Tensor]]
"""(answer is right, is to be forgotten, label) of this rank's samples, batch by batch."""


def _answers(run: Run, loader: Loader, indices: list[int] | None) -> Answers:
    """Ask the model about these samples (default: all), in evaluation mode."""
    was_training = run.model.training
    run.model.eval()

    found = []
    with torch.no_grad():
        for host in keep_pace([run.model], sweep(run, loader, indices)):
            batch = host.to(run.ranks.device)
            with run.precision.autocast(run.ranks.device):
                answer = run.model(batch.images).logits.argmax(dim=1)
            found.append((answer == batch.labels, batch.forget, batch.labels))
    run.model.train(was_training)
    return found


def _larger(run: Run) -> str:
    if run.recipe.batch_norm_group:
        return "or a batch_norm_group that divides every batch and is larger"
    return "a larger batch_size or fewer micro-batches"


@contextmanager
def explain_step(run: Run, phase: Phase, batch: Batch) -> Iterator[None]:
    """Say what would do where a step fails by memory, graphs, or a batch or loss torch refuses."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        count = run.recipe.grad_accum_steps
        raise RunFailed(
            f"got no memory left on {run.ranks.device} for {len(batch.labels)} samples a rank in "
            f"{count} micro-batch{'es' * (count > 1)} ({str(error).partition('.')[0]}); expected "
            f"less at a time; take grad_accum_steps {2 * count}, which keeps the batch, or a "
            f"batch_size of {batch.total // 2}; what was saved last stays"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise RunFailed(
            f"got a single value in a channel of a batch-norm, of {len(batch.labels)} samples a "
            f"rank in {run.recipe.grad_accum_steps} micro-batches in phase {phase.name}; expected "
            f"two or more; use batch_norm frozen, {_larger(run)}"
        ) from error
    except RuntimeError as error:
        if "CUDAGraphs" in str(error):
            raise RunFailed(
                f"got a step that CUDA graphs cannot replay ({str(error).partition('.')[0]}); use "
                "compile default, which has none"
            ) from error
        if "finished reduction in the prior iteration" not in str(error):
            raise
        raise RunFailed(
            f"got a loss of phase {phase.name}, or of the one before, that leaves weights out; "
            "expected one that reaches every weight, for which DDP waits; use reduce flat"
        ) from error
