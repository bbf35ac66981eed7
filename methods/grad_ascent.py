"""Gradient ascent on the forget set (Thudi et al. 2022, "Unrolling SGD"; the field's GA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from letheon.methods.finetune import cross_entropy


def ascent(net: nn.Module, batch: Batch) -> Tensor:
    """Minus the mean cross-entropy: descending it raises the loss on the batch."""
    return -cross_entropy(net, batch)


def bounded_ascent(net: nn.Module, batch: Batch) -> Tensor:
    """Minus the mean of min(CE of a sample, ln C): a sample worse than chance pulls no further.

    C is the number of classes, so the ascent ends where the network knows nothing of the samples.
    Ours; the published code climbs without a bound.
    """
    logits = net(batch.images).logits
    loss = F.cross_entropy(logits, batch.labels, reduction="none")
    return -loss.clamp(max=math.log(logits.shape[1])).mean()


Ascent = Literal["unbounded", "bounded"]
ASCENTS = {"unbounded": ascent, "bounded": bounded_ascent}


@dataclass(frozen=True)
class GradAscent(Method):
    """GA: climb the loss of the forget set; the retain set is never read.

    Unbounded by nature: a rate a little too high destroys the network. The published rate on
    ImageNet is 5e-6 for 8 epochs, the field's on CIFAR-10 1e-4 for 5.
    """

    name: ClassVar[str] = "grad-ascent"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="GA",
        reads="forget",
        formula="-CE(F)",
        cost="1",
        source="Thudi et al. 2022",
    )
    recipe: Recipe = Recipe(epochs=5, lr=1e-4)
    forget_batch_norm: Literal["frozen", "recipe"] = "frozen"
    """Batch-norm while only forget samples are read; the code of arXiv 2503.06991 has `recipe`,
    which turns the running statistics into those of the forgotten classes."""
    ascent: Ascent = "unbounded"
    """bounded: each sample's loss counts up to ln C, the loss of a guess among C classes."""

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """One pass over the forget set."""
        return [Phase("ascend", "forget", ASCENTS[self.ascent], self.forget_batch_norm)]
