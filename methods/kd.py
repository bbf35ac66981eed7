"""KD (arXiv 2503.06991): ascend on the forget set, keep the original's logits on the retain set."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor

from letheon.engine.method import Definition, Run
from letheon.engine.models.classifier import Output
from letheon.loaders.batch import Batch
from letheon.methods.distillation import divergence, require_range
from letheon.methods.restoring import Restoring


@dataclass(frozen=True)
class Kd(Restoring):
    """GA+KD: -CE(F); then ce_weight CE + kd_weight KL_T(p_original || p) on R.

    The divergence is Hinton et al. 2015's, times T^2; arXiv 2503.06991 has it beside SPKD. The
    published code has weights 10 and 10 and T = 1, its port to vision transformers T = 2. Epochs,
    rate and batch are those of the published SPKD; what the digits gave is in docs/methods.md.
    """

    name: ClassVar[str] = "kd"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="GA_KD; PL_KD (forget-pass pseudo-label)",
        reads="forget, then retain",
        formula="-CE(F); then 10 CE(R) + 10 KL_T(p_o, p)",
        cost="1, then 4/3",
        source="Rethinking Unlearning for Transfer Learning, code",
    )
    temperature: float = 1.0
    """Divides the logits of both models before their divergence."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        require_range(temperature=(self.temperature, 1e-3, inf))

    def distance(self, output: Output, goal: Output, batch: Batch, run: Run) -> Tensor:
        """The mean divergence from the original's answers."""
        return divergence(output.logits, goal.logits, self.temperature).mean()
