"""Selective synaptic dampening (SSD) and its loss-free form (LFSSD): one-shot edits of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Run
from letheon.engine.numbers.sweep import Part
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import absolute_gradient_sum, squared_gradient_sum
from letheon.loaders.batch import Batch
from letheon.methods.distillation import in_fp32
from letheon.methods.finetune import cross_entropy
from letheon.methods.requirements import require_between, require_positive, require_samples


@dataclass(frozen=True)
class Ssd(Method):
    """SSD: shrink the weights that matter more for the forget set than for all data.

    I_f and I_D are the mean squared gradients of each sample's cross-entropy over the forget set
    and over the whole training set, per weight. Where I_f > alpha I_D the weight becomes
    min(lambda I_D / I_f, 1) times itself (Foster, Schoepf and Brintrup 2024, eq. 5 and 6).

    alpha 10 and lambda 1 are the published defaults for ResNet-18; the authors take alpha 5 for
    ViT, and lambda 0.1 with alpha 50 for faces. Their code squares the mean gradient of each batch
    of 64 in place of each sample's own (`importance batch`), which makes both importances depend on
    the batch size. No retain sample is needed, but all training samples are read once.
    """

    name: ClassVar[str] = "ssd"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="SSD",
        reads="all, once",
        formula="where I_f > alpha I_D: w becomes min(lambda I_D / I_f, 1) w; I the mean squared "
        "gradient of samples",
        cost="N + N_f g",
        source="Foster et al. 2024, eq. 5, 6",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"alpha": (1.0, 100.0)}
    recipe: Recipe = Recipe(epochs=0, batch_size=64)
    alpha: float = 10.0
    """How many times as important for the forget set a weight must be to be shrunk."""
    dampening: float = 1.0
    """lambda: the shrunk weight's share is this times I_D / I_f, at most 1."""
    importance: Literal["sample", "batch"] = "sample"
    """sample: of each sample's own gradient; batch: of the mean gradient of a batch, the published
    shortcut, which depends on the batch size and the number of ranks."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        require_positive("alpha", self.alpha)
        require_between("dampening", self.dampening)

    def check(self, run: Run) -> None:
        """Refuse a request without a forget sample."""
        require_samples(run, self.name, retain=False)

    def prepare(self, run: Run) -> State:
        """Shrink the weights."""
        counts = {"forget": int(run.forget.sum()), "all": len(run.forget)}
        most = counts["all"] / counts["forget"]  # I_D holds the forget set's own share
        if self.importance == "sample" and self.alpha >= most:
            run.warnings.append(
                f"alpha {self.alpha:g} changes no weight: the forget set is one in {most:.3g} "
                f"samples, so that none can be {most:.3g} times as important; lower alpha"
            )
        forget, everything = (
            [total / counts[part] for total in self.importances(run, part)]
            for part in ("forget", "all")
        )
        with torch.no_grad():
            for weight, ours, whole in zip(run.parameters, forget, everything, strict=True):
                share = (self.dampening * whole / ours).clamp(max=1.0)
                weight.mul_(torch.where(ours > self.alpha * whole, share, 1.0))
        return State()

    def importances(self, run: Run, part: Part) -> list[Tensor]:
        """Sum of the importances over the samples, one tensor per parameter."""
        return squared_gradient_sum(run, part, cross_entropy, self.importance)


def output_norm(net: nn.Module, batch: Batch) -> Tensor:
    """Mean squared l2 norm of the logits: a sensitivity that needs no label."""
    logits: Tensor = in_fp32(net(batch.images).logits)
    return logits.square().sum(dim=1).mean()


@dataclass(frozen=True)
class Lfssd(Ssd):
    """LFSSD: SSD whose importances need no labels.

    The importance of a weight is the mean absolute gradient of the squared l2 norm of the logits
    (Foster, Schoepf and Brintrup 2024, "Loss-Free Machine Unlearning", after Aljundi et al. 2018);
    all else is `ssd`. Our reading: the full text and code were not at hand for the exact norm. The
    defaults are SSD's.
    """

    name: ClassVar[str] = "lfssd"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="LFSSD",
        reads="all, once",
        formula="as ssd, with I the mean absolute gradient of the squared norm of the logits; our "
        "reading",
        cost="N + N_f g",
        source="Foster et al. 2024 (loss-free)",
    )

    def importances(self, run: Run, part: Part) -> list[Tensor]:
        """Sum over the samples of the absolute gradient of the output's norm."""
        return absolute_gradient_sum(run, part, output_norm, self.importance)
