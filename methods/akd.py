"""AKD (arXiv 2503.06991): ascend on the forget set, keep the original's activations elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from letheon.engine.method import Definition, Run
from letheon.engine.models.classifier import Output
from letheon.loaders.batch import Batch
from letheon.methods.restoring import Restoring


@dataclass(frozen=True)
class Akd(Restoring):
    """GA+AKD: -CE(F); then ce_weight CE + kd_weight mean (f - f_original)^2 on R.

    f is the pooled feature, and the mean goes over samples and coordinates. The definition is that
    of the published code (arXiv 2503.06991), with weights 10 and 10. Epochs, rate and batch are
    those of the published SPKD; what the digits gave is in docs/methods.md.
    """

    name: ClassVar[str] = "akd"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="GA_AKD, PL_AKD",
        reads="forget, then retain",
        formula="-CE(F); then 10 CE(R) + 10 mean (f - f_o)^2",
        cost="1, then 4/3",
        source="Rethinking Unlearning for Transfer Learning, code",
    )

    def distance(self, output: Output, goal: Output, batch: Batch, run: Run) -> Tensor:
        """The mean squared difference of the pooled features."""
        return F.mse_loss(output.features, goal.features.to(output.features.dtype))
