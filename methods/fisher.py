"""Fisher forgetting: noise on each weight, the more the less the retain set depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Run
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import squared_gradient_sum, squared_gradient_sum_of
from letheon.errors import InputError
from letheon.kernels.keyed import normal
from letheon.loaders.batch import Batch
from letheon.methods.distillation import class_mask
from letheon.methods.finetune import cross_entropy
from letheon.methods.requirements import require_positive, require_samples


def add_noise(run: Run, deviations: list[Tensor]) -> None:
    """Add N(0, deviation^2) to each trainable weight, drawn by the run's seed, equal on ranks."""
    with torch.no_grad():
        for place, (weight, size) in enumerate(zip(run.parameters, deviations, strict=True)):
            whole = run.whole_shape(weight)
            index = torch.arange(whole.numel(), device=weight.device)
            noise = normal(run.seed, "fisher-noise", place, index, 1)[:, 0].view(whole)
            noise = run.own_part(noise)
            weight.add_((size * noise).to(weight.dtype))


@dataclass(frozen=True)
class Fisher(Method):
    """FF: add noise of variance alpha / F to each weight, F its Fisher information on retain data.

    F = mean over the retain set of (d log p(y|x) / dw)^2, each sample's own; w becomes w +
    min((alpha / F)^(1/2), limit) N(0, 1), ten times as much in the last layer (Golatkar, Achille
    and Soatto 2020, eq. 8, in the form that Jia et al. 2023 compare with). alpha was searched from
    1e-9 to 1e-7 there; the limit of 1e-3 is theirs. Their code finds the last layer by a size of 10
    in its last dimension, which is the bias of a ten-class head alone (`amplify bias`).

    Every retain sample is read once. The noise is a function of the seed alone, and has no
    direction: whether a class loses or gains by it is its draw (docs/methods.md).
    """

    name: ClassVar[str] = "fisher"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="FF",
        reads="retain, once",
        formula="w + min((alpha / F)^(1/2), limit) N(0, 1), ten times in the last layer",
        cost="N_r g",
        source="Golatkar et al. 2020, eq. 8; Jia et al. 2023",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "alpha": (1e-10, 1e-4),
        "limit": (1e-3, 0.3),  # it alone bounds the noise where the Fisher information is small
    }
    recipe: Recipe = Recipe(epochs=0)
    alpha: float = 1e-8
    """Variance of the noise where the Fisher information is 1."""
    limit: float = 1e-3
    """Largest standard deviation, before the last layer's factor."""
    amplify: Literal["head", "bias"] = "head"
    """What has ten times the noise. head: weight and bias of the last layer; bias: its bias alone,
    as in the published code on ten classes."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_positive("alpha", self.alpha)
        require_positive("limit", self.limit)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves no retain sample, and noise for a bias that is not there."""
        require_samples(run, self.name, forget=False)
        if self.amplify == "bias" and run.model.head.bias is None:
            raise InputError(
                f"got amplify bias for {run.model.name}, whose last layer has no bias; expected a "
                "network with one; use amplify head",
                option="amplify",
            )

    def prepare(self, run: Run) -> State:
        """Add the noise."""
        count = int((~run.forget).sum())
        sums = squared_gradient_sum(run, "retain", cross_entropy)
        sizes = [(self.alpha / (total / count)).sqrt().clamp(max=self.limit) for total in sums]
        head = run.model.head
        raised = [head.bias] if self.amplify == "bias" else [head.weight, head.bias]
        mine = [run.own_parameter(one) for one in raised if one is not None]
        for parameter, size in zip(run.parameters, sizes, strict=True):
            if any(parameter is one for one in mine):
                size *= 10
        add_noise(run, sizes)
        return State()


def class_loss(net: nn.Module, batch: Batch, label: int) -> Tensor:
    """Mean over the samples of p(label)^(1/2) CE(label), the probability taken as constant.

    Its squared gradient is that of CE(label), weighed by p(label).
    """
    log_p = net(batch.images).logits.log_softmax(dim=1)[:, label]
    return -((log_p.detach() / 2).exp() * log_p).mean()


def true_fisher(run: Run) -> list[Tensor]:
    """Mean over the retain set of sum_y p(y|x) (d CE_y / dw)^2, by one pass for each class."""
    losses = [partial(class_loss, label=label) for label in range(run.model.classes)]
    count = (~run.forget).sum()
    return [total / count for total in squared_gradient_sum_of(run, "retain", losses)]


@dataclass(frozen=True)
class GolatkarFisher(Method):
    """Golatkar's Fisher forgetting: noise by the true Fisher, averaged over inputs.

    F = mean over the retain set of sum_y p(y|x) (d CE_y / dw)^2. The variance of a weight's noise
    is alpha min(1 / (F + 1e-8), top), averaged over its input dimension: one variance for each
    output channel and kernel position; top is 1000, in the last
    layer 100. Last layer and one-dimensional weights (biases, batch-norm) have ten times the
    variance (Golatkar, Achille and Soatto 2020, eq. 8; the limits are their code's). The last
    layer's rows of forgotten classes become noise around 0, which alone is enough to forget a class
    by the answers (docs/methods.md).

    alpha 1e-6 is what later comparisons use. Their code takes the gradient of batches of 32 in
    place of samples, and forgets the row of a class only where 4500 or 450 samples are forgotten.
    Costs as many passes over the retain set as there are classes.
    """

    name: ClassVar[str] = "fisher-golatkar"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="FF, Golatkar's form",
        reads="retain, once a class",
        formula="noise by the true Fisher information, one variance for each output channel and "
        "kernel position",
        cost="C N_r g",
        source="Golatkar et al. 2020",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"alpha": (1e-9, 1e-3)}
    recipe: Recipe = Recipe(epochs=0)
    alpha: float = 1e-6
    """Scale of the variance."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_positive("alpha", self.alpha)

    def check(self, run: Run) -> None:
        """Refuse a request that leaves no retain sample."""
        require_samples(run, self.name, forget=False)

    def prepare(self, run: Run) -> State:
        """Add the noise."""
        head, sizes = run.model.head, []
        own = [run.own_parameter(one) for one in (head.weight, head.bias) if one is not None]
        for weight, fisher in zip(run.parameters, true_fisher(run), strict=True):
            last = any(weight is one for one in own)
            variance = (1 / (fisher + 1e-8)).clamp(max=1e2 if last else 1e3)
            if weight.dim() > 1:
                variance = variance.mean(dim=1, keepdim=True).expand_as(weight)
            raised = last or weight.dim() == 1
            sizes.append((self.alpha * variance * (10 if raised else 1)).sqrt())
        gone = run.own_part(class_mask(run))
        with torch.no_grad():
            for one in own:
                one.masked_fill_(gone.view(-1, *[1] * (one.dim() - 1)), 0)
        add_noise(run, sizes)
        return State()
