"""One SGD step on weights of which some must not move.

Weight decay is added to the gradient; then comes momentum as in `torch.optim.SGD` with dampening 0.
The mask acts on the result of all that, so a masked weight keeps its bits whatever the decay, the
momentum or a gradient that is not finite. (SalUn, Fan et al. 2024, defines the unlearned weights
so: masked ones are the original's. Code that masks only the gradient lets decay and momentum move
them.)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from letheon.kernels import takes_triton
from letheon.kernels.masked_sgd_reference import masked_sgd_reference_


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    skip: Tensor | None = None,
) -> None:
    """Update the parameters and momentum buffers in place; reads each array once.

    The lists may hold one flat buffer each (`kernels.flat`), which is one kernel launch on CUDA and
    the fastest form everywhere, or the tensors of a model, one launch a tensor. No host sync.

    Args:
        params: float tensors.
        grads: of the same shapes; another float type is converted.
        momenta: buffers like the parameters, zero before the first step; not read where `momentum`
            is 0.
        masks: true where a weight may move: bool of the parameter's shape, or for a
            one-dimensional parameter also the uint8 bits of `threshold.pack` (less memory; on
            the CPU bool is a quarter faster). The momentum of a masked weight becomes zero.
        lr: a number, or a 0-dim tensor on the parameters' device.
        momentum: as in torch.optim.SGD.
        weight_decay: times the weight, added to the gradient.
        skip: 0-dim; where it is not zero the step leaves everything as it was (a loss scale that
            overflowed).
    """
    if params and takes_triton(params[0]):
        from letheon.kernels.masked_sgd_triton import masked_sgd_triton_ as form
    else:
        form = masked_sgd_reference_
    form(params, grads, momenta, masks, lr, momentum, weight_decay, skip)
