"""Losses over relations between the samples of a batch, on all ranks: similarities, contrasts."""

from __future__ import annotations

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows
from letheon.engine.method import Run
from letheon.errors import InputError
from letheon.loaders.batch import Batch, Reads, Stream
from letheon.loaders.order import share


def all_rows(own: Tensor, run: Run, total: int) -> Tensor:
    """Gather the (total, ...) rows of all ranks; a gradient flows to this rank's own alone.

    The other ranks' rows enter as constants: the sum over ranks of each rank's own partial gradient
    of one value of all rows is the whole gradient, without a collective in the backward pass. Pass
    the value through `count_once`.
    """
    ranks, group = run.ranks, run.recipe.batch_norm_group
    if ranks.world == 1:
        return own
    rows = gather_rows(own.detach(), ranks, total, group)
    mine = share(total, ranks.rank, ranks.world, group)
    return torch.cat([rows[: mine.start], own, rows[mine.stop :]])


def count_once(value: Tensor, batch: Batch, ranks: Ranks) -> Tensor:
    """Scale a value that every rank computes of all rows, so that averaging over ranks is exact.

    The loop weighs a rank's loss by its share n_rank * world / total and the ranks are averaged:
    the value counts once over the ranks, the gradient of each rank's own rows fully.
    """
    if ranks.world == 1:
        return value
    unweighted = batch.total / len(batch.labels)  # = world / share
    return value.detach() + (value - value.detach()) * unweighted


def refuse_micro_batches(
    run: Run, mend: str = "use one micro-batch", reads: Reads = "retain"
) -> None:
    """Refuse micro-batches where a loss joins all samples of a batch, and ranks without one.

    `reads` is what the pass with that loss reads.

    Raises:
        InputError: `mend` says what to do instead.
    """
    if run.recipe.grad_accum_steps > 1:
        raise InputError(
            f"got {run.recipe.grad_accum_steps} micro-batches with a loss over the whole "
            f"batch; {mend}",
            option="grad_accum_steps",
        )
    if run.fewest_parts(Stream(reads)) < run.ranks.world:
        raise InputError(
            f"got a {reads} batch of fewer samples than {run.ranks.world} ranks with a loss "
            "over the whole batch, to which every rank adds; start fewer ranks or use another "
            "batch size",
            option="batch_size",
        )
