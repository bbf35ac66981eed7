"""SPKD (arXiv 2503.06991): ascend on the forget set, restore similarities on the retain set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State, rebuilt
from letheon.engine.method import Definition, Method, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.teacher import teacher_features
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.kernels.similarity import similarity_loss
from letheon.loaders.batch import Batch
from letheon.methods.grad_ascent import ASCENTS, Ascent
from letheon.methods.relations import all_rows, count_once, refuse_micro_batches


@dataclass
class SpkdState(State):
    """The original model."""

    teacher: Classifier = rebuilt()


@dataclass(frozen=True)
class Spkd(Method):
    """SPKD: each epoch ascends on the forget set, then descends on the retain set
    ce_weight * CE + sp_weight * SP, SP the similarity-preserving loss to the original model.

    SP (Tung and Mori 2019, eq. 4): Gram matrices of the pooled features of a batch, rows
    l2-normalised, squared Frobenius norm of the difference over b^2; their weight beside a
    cross-entropy of weight 1 is 3000. The published code has 10 * CE + 10 * SP with the norm not
    squared (`--norm unsquared --sp-weight 10`).
    """  # noqa: D205

    name: ClassVar[str] = "spkd"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="SPKD, GA_SPKD",
        reads="forget, then retain",
        formula="-CE(F); then w CE(R) + v SP(R)",
        cost="1, then 4/3",
        source="Rethinking Unlearning for Transfer Learning, code; Tung and Mori 2019",
    )
    separates_forget: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=15, lr=1e-5, batch_size=128)
    ce_weight: float = 10.0
    """Weight of the cross-entropy on the retain set."""
    sp_weight: float = 30_000.0
    """Weight of the similarity-preserving loss."""
    norm: Literal["squared", "unsquared"] = "squared"
    """Frobenius norm of the difference of the Gram matrices, squared (as the paper) or not."""
    gram: Literal["gathered", "local"] = "gathered"
    """gathered: one Gram over the global batch, so the ranks do not matter; local: one per rank."""
    optimizers: Literal["shared", "separate"] = "shared"
    """shared: the ascent's momentum runs on into the restoring pass, as published."""
    forget_batch_norm: Literal["frozen", "recipe"] = "recipe"
    """Batch-norm while ascending. Frozen, its statistics bind the ascent to weights that are no
    longer there, and the network collapses at rates too low to forget (`docs/methods.md`)."""
    ascent: Ascent = "unbounded"
    """bounded: each sample's loss counts up to ln C, the loss of a guess among C classes."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("ce_weight", "sp_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"got {name} {value}; expected a finite number of 0 or more")

    def check(self, run: Run) -> None:
        """Refuse micro-batches where similarities are between all samples of a batch."""
        if self.gram == "gathered":
            refuse_micro_batches(
                run, "use gram local, which compares within each micro-batch, or one micro-batch"
            )

    def prepare(self, run: Run) -> SpkdState:
        """Keep the original model as the teacher."""
        return SpkdState(run.teacher())

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """The forget set, then the retain set."""
        assert isinstance(state, SpkdState)
        teacher, ranks = state.teacher, run.ranks
        squared = self.norm == "squared"

        def restore(net: nn.Module, batch: Batch) -> Tensor:
            goal = teacher_features(teacher, batch.images)
            output = net(batch.images)
            ce = F.cross_entropy(output.logits, batch.labels)
            if self.gram == "gathered":
                student = all_rows(output.features, run, batch.total)
                whole = all_rows(goal, run, batch.total)
                sp = count_once(similarity_loss(student, whole, squared), batch, ranks)
            else:
                sp = similarity_loss(output.features, goal, squared)
            return self.ce_weight * ce + self.sp_weight * sp

        slot = "main" if self.optimizers == "shared" else "forget"
        return [
            self.forget_phase(run, state.teacher, slot),
            Phase("restore", "retain", restore),
        ]

    def forget_phase(self, run: Run, teacher: Classifier, slot: str) -> Phase:
        """Ascend on the forget set."""
        return Phase("ascend", "forget", ASCENTS[self.ascent], self.forget_batch_norm, slot)
