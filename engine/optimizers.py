"""Optimizers that torch lacks: LARS, Muon for convolutions, SGD that leaves masked weights alone.

Neither waits for the host, under loss scaling either: where the scale overflowed (`found_inf`, set
by torch's GradScaler) a step changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from letheon.engine.gradient_sync import Flat
from letheon.kernels.masked_sgd import masked_sgd_

TRUST = 1e-3
"""eta of LARS, as in the paper's experiments."""


class Lars(torch.optim.Optimizer):
    """SGD with a rate for each layer, for large batches (You, Gitman and Ginsburg 2017).

    For a layer's weights w with gradient g, trust eta, decay beta, rate gamma and momentum m:
    lambda = eta |w| / (|g| + beta |w|), v <- m v + gamma lambda (g + beta w), w <- w - v. Where |w|
    or the denominator is zero lambda is 1. Biases and batch-norm (tensors of one dimension) are, as
    is usual and unlike the paper, neither scaled nor decayed.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
    ):
        super().__init__(list(parameters), {"lr": lr})
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in weights]
            for kind in (True, False):
                indices = [i for i, w in enumerate(weights) if (w.dim() > 1) is kind]
                if indices:
                    self._move(
                        [weights[i] for i in indices],
                        [grads[i] for i in indices],
                        group["lr"],
                        kind,
                    )

    def _move(self, weights: list[Tensor], grads: list[Tensor], lr: float, layers: bool) -> None:
        if layers:
            sizes, slopes = (torch.stack(torch._foreach_norm(t)) for t in (weights, grads))
            pulls = slopes + self.weight_decay * sizes
            scale = torch.where((sizes > 0) & (pulls > 0), TRUST * sizes / pulls, 1.0) * lr
            pull = list(torch._foreach_add(grads, weights, alpha=self.weight_decay))
            torch._foreach_mul_(pull, list(scale.unbind()))
        else:
            pull = list(torch._foreach_mul(grads, lr))
        velocity = [momentum_buffer(self.state[w], w) for w in weights]
        moved = list(torch._foreach_mul(velocity, self.momentum))
        torch._foreach_add_(moved, pull)
        velocity_after = moved
        overflow = getattr(self, "found_inf", None)
        if overflow is not None:
            pairs = zip(moved, velocity, strict=True)
            velocity_after = [torch.where(overflow == 0, new, old) for new, old in pairs]
            moved = [torch.where(overflow == 0, new, 0) for new in moved]
        torch._foreach_copy_(velocity, velocity_after)
        torch._foreach_sub_(weights, moved)


SERIES = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's odd polynomial, as published."""
SERIES_STEPS = 3
"""Times it is applied: 3 as for CIFAR-10 by its author, where 5 are usual."""


class Muon(torch.optim.Optimizer):
    """Muon on convolutions, Nesterov SGD on everything else (Jordan et al. 2024, "Muon").

    A kernel W of shape (out, in, h, w) is a matrix of `out` rows. With gradient g, momentum m and
    rate gamma: v <- m v + g, W <- sqrt(out) W / |W| - gamma orthogonalize(g + m v). The fixed norm
    is for networks with batch-norm behind their convolutions, whose output it does not change; it
    stands in place of decay (Jordan 2024, the CIFAR-10 runs). Other tensors w with decay beta:
    v <- m v + (g + beta w), w <- w - gamma (g + beta w + m v).

    torch.optim.Muon, from torch 2.9 on, takes matrices alone, computes in bfloat16 and has no fixed
    norm.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ):
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay})
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        overflow = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                kernel = weight.dim() > 2
                pull = weight.grad
                if not kernel and group["weight_decay"]:
                    pull = pull.add(weight, alpha=group["weight_decay"])
                velocity = momentum_buffer(self.state[weight], weight)
                speed = velocity * self.momentum + pull
                pull = pull.add(speed, alpha=self.momentum)
                moved = weight
                if kernel:
                    moved = weight * (len(weight) ** 0.5 / weight.norm().clamp(min=1e-12))
                    pull = orthogonalize(pull.flatten(1)).view(weight.shape)
                moved = moved.add(pull, alpha=-group["lr"])
                if overflow is not None:
                    moved = torch.where(overflow == 0, moved, weight)
                    speed = torch.where(overflow == 0, speed, velocity)
                velocity.copy_(speed)
                weight.copy_(moved)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix near 1, by Newton-Schulz steps in its own dtype.

    Each step maps a singular value s to a s + b s^3 + c s^5, with the coefficients `SERIES`.

    Args:
        matrix: (rows, columns). Divided by its Frobenius norm; its singular vectors stay.

    Returns:
        (rows, columns); after three steps values from 0.02 of the norm on lie between about 0.6 and
        1.2. Zero where the matrix is.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-12)
    a, b, c = SERIES
    for _ in range(SERIES_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


def momentum_buffer(state: dict[str, Any], weight: Tensor) -> Tensor:
    """Get the momentum of a weight from its optimizer state; zeros at its first step."""
    if not state:
        state["momentum_buffer"] = torch.zeros_like(weight)
    buffer: Tensor = state["momentum_buffer"]
    return buffer


class MaskedSgd(torch.optim.Optimizer):
    """torch's SGD on the weights a mask lets move; decay, momentum and mask in one pass.

    A masked weight keeps its bits (`kernels.masked_sgd`). Over flat buffers it is one kernel, the
    mask as bits on CUDA; else one a tensor.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        masks: Sequence[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        flat: Flat | None = None,
    ):
        """`masks` are bool, true where a weight may move, in the order of the parameters."""
        super().__init__(list(parameters), {"lr": lr})
        self.momentum, self.weight_decay, self.flat = momentum, weight_decay, flat
        if flat is not None:
            like = [flat.weights]
            # On the CPU bool is a quarter faster than bits (benchmarks/results/kernels_cpu.csv).
            on_cuda = flat.weights.is_cuda
            self.masks = [flat.layout.bits(masks) if on_cuda else flat.layout.gather(masks)]
        else:
            like = list(parameters)
            self.masks = [  # in the memory order of the weights
                torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
                for parameter, mask in zip(parameters, masks, strict=True)
            ]
        self.momenta = [torch.zeros_like(tensor) for tensor in like]
        for parameter, buffer in zip(parameters, self.momenta, strict=False):
            self.state[parameter]["momentum_buffer"] = buffer  # the flat one is the first's

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the weights inside the mask that have a gradient."""
        assert closure is None
        group = self.param_groups[0]
        if self.flat is not None:
            weights, grads = [self.flat.weights], [self.flat.gradients]
            momenta, masks = self.momenta, self.masks
        else:
            everything = zip(group["params"], self.momenta, self.masks, strict=True)
            used = [(p, p.grad, b, m) for p, b, m in everything if p.grad is not None]
            weights, grads, momenta, masks = ([u[i] for u in used] for i in range(4))
        masked_sgd_(
            weights, grads, momenta, masks, group["lr"], self.momentum, self.weight_decay,
            skip=getattr(self, "found_inf", None),
        )  # fmt: skip
