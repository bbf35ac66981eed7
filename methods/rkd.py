"""RKD (arXiv 2503.06991): ascend on the forget set, keep distances and angles on the retain set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from letheon.engine.method import Definition, Run
from letheon.engine.models.classifier import Output
from letheon.kernels.similarity import angle_loss, distance_loss
from letheon.loaders.batch import Batch
from letheon.methods.distillation import in_fp32
from letheon.methods.relations import all_rows, count_once, refuse_micro_batches
from letheon.methods.restoring import Restoring


@dataclass(frozen=True)
class Rkd(Restoring):
    """GA+RKD: -CE(F); then ce_weight CE + kd_weight (RKD-D + RKD-A) on R.

    Park et al. 2019, eq. 6 and 8: Huber losses between the pairwise distances, over their mean, and
    between the angles of triplets of a batch, of l2-normalized pooled features, over the samples of
    all ranks. The published code (arXiv 2503.06991) has weights 10 for each of the three and takes
    the means over pairs and triplets that hold a sample twice, too, which makes them (b-1)/b and
    (b-1)(b-2)/b^2 times ours. Epochs, rate and batch are those of the published SPKD; what the
    digits gave is in docs/methods.md.
    """

    name: ClassVar[str] = "rkd"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="GA_RKD, PL_RKD",
        reads="forget, then retain",
        formula="-CE(F); then 10 CE(R) + 10 (distances + angles) of f, l2-normalized",
        cost="1, then 4/3",
        source="Rethinking Unlearning for Transfer Learning, code; Park et al. 2019",
    )

    def check(self, run: Run) -> None:
        """Refuse micro-batches, which cannot see all pairs, and as all of its family."""
        super().check(run)
        refuse_micro_batches(run)

    def distance(self, output: Output, goal: Output, batch: Batch, run: Run) -> Tensor:
        """Distances and angles of the whole batch, over all ranks."""
        own, other = (
            all_rows(F.normalize(in_fp32(answer.features), dim=1), run, batch.total)
            for answer in (output, goal)
        )
        return count_once(distance_loss(own, other) + angle_loss(own, other), batch, run.ranks)
