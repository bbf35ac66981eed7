"""Optimizers that torch does not have: LARS, and SGD that leaves masked weights alone.

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
        velocity = [self._velocity(w) for w in weights]
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

    def _velocity(self, weight: Tensor) -> Tensor:
        state: dict[str, Any] = self.state[weight]
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
