"""Sums of what each sample's own gradient is made of, of a network split over the ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from letheon.engine.checkpoints.sweep_state import SplitGradients
from letheon.engine.memory.shards import blank_pass
from letheon.engine.method import Loss, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.numbers.sweep import Part, batches
from letheon.loaders.batch import Batch


def split_magnitude_sum(
    run: Run, part: Part, loss: Loss, by: str, magnitude: Callable[[Tensor], Tensor], name: str
) -> list[Tensor]:
    """Sum magnitudes (squares, absolute values) of gradients, by sample or by batch.

    A block's gradient is whole on the rank whose sample it is of, until it is averaged and split;
    there its magnitude is taken. So each rank passes one sample at a time, all of them at once, and
    none holds more than a block. Every rank must call, with the model in evaluation mode.

    Args:
        run: the run, whose network is split.
        part: which training samples.
        loss: (net, batch) -> mean loss of the batch.
        by: sample, or batch: the mean gradient of a rank's part of one, times its samples.
        magnitude: elementwise.
        name: what is added up, with all that it depends on.

    Returns:
        This rank's part of the sum, one float32 tensor per trainable parameter.
    """
    shards, model, device = run.shards, run.model, run.ranks.device
    assert shards is not None
    weight = [0.0]  # samples that the next gradient stands for, and what undoes the mean over ranks

    def change(grad: Tensor) -> Tensor:
        return magnitude(grad) * weight[0]

    def passes(mine: int) -> int:
        """Passes of the rank that has the most of them in this round."""
        most = torch.tensor(mine)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def blank(net: Classifier) -> None:
        for _ in range(passes(0)):
            blank_pass(net)

    model.zero_grad(set_to_none=True)
    sums = SplitGradients(shards)
    with shards.change_gradients(change):
        for batch in batches(run, part, name, sums, blank=blank):
            pieces = [batch] if by == "batch" else _samples(batch)
            for number in range(passes(len(pieces))):
                if number >= len(pieces):
                    blank_pass(model)
                    continue
                piece = pieces[number]
                weight[0] = float(len(piece.labels) * run.ranks.world)
                if by == "batch":
                    with run.precision.autocast(device):
                        value = loss(model, piece)
                else:  # in the weights' own number format, as where the network is whole
                    value = loss(model, piece)
                value.backward()
        found = [tensor.clone() for tensor in sums.tensors()]
    model.zero_grad(set_to_none=True)
    shards.clear()
    return found


def _samples(batch: Batch) -> list[Batch]:
    """Each sample as a batch of one."""
    columns = zip(
        batch.images.split(1), batch.labels.split(1), batch.forget.split(1), batch.index.split(1),
        strict=True,
    )  # fmt: skip
    return [Batch(image, label, flag, number, 1) for image, label, flag, number in columns]
