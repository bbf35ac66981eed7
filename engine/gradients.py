"""Gradient statistics over a set. The only place they come from, because it reduces over ranks.

A statistic from one rank's own samples differs between ranks, and a mask made from it lets the
ranks drift apart without an error.
"""

from __future__ import annotations

from torch import Tensor

from letheon.engine.distributed import sum_over_ranks
from letheon.engine.method import Loss, Run
from letheon.loaders.batch import Reads


def summed_gradients(run: Run, reads: Reads, loss: Loss) -> list[Tensor]:
    """Sum over the samples of one stream of the gradient of each sample's loss.

    The model is in evaluation mode (running batch-norm statistics, no dropout), as the field
    computes saliency. `loss` is a mean over a batch, so each batch's gradient is weighted by its
    size: the sum does not depend on the batch size, its last batch or the number of ranks.

    Args:
        run: the run; its model's weights and gradients are left as they were.
        reads: ``forget`` or ``retain``; each sample is read once, untransformed by augmentation.
        loss: (net, batch) -> mean loss of the batch.

    Returns:
        One tensor per trainable parameter, float32, bitwise equal on every rank.
    """
    run.decide_dtype()
    model = run.model
    was_training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    chosen = run.forget if reads == "forget" else ~run.forget
    for host in run.loader.sweep(chosen.nonzero().flatten().tolist()):
        batch = host.to(run.ranks.device)
        with run.precision.autocast(run.ranks.device):
            value = loss(model, batch)
        (value * len(batch.labels)).backward()
    sums = [
        parameter.grad if parameter.grad is not None else parameter.new_zeros(parameter.shape)
        for parameter in run.parameters
    ]
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    sum_over_ranks(sums, run.ranks)
    return sums
