"""PL+SPKD: pseudo-labels on the forget set, then similarities restored on the retain set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from letheon.engine.method import Definition, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.methods.pseudo_label import pseudo_label_loss
from letheon.methods.requirements import require_retained_class
from letheon.methods.spkd import Spkd


@dataclass(frozen=True)
class PlSpkd(Spkd):
    """PL+SPKD: each epoch descends CE to pseudo-labels on F, then ce_weight CE + sp_weight SP on R.

    SPKD with a first pass that is bounded: instead of climbing its loss, the forget set learns the
    original's best class that is kept (`pseudo-label`). From the published code (arXiv 2503.06991),
    whose SP is not squared (`--norm unsquared --sp-weight 10`). Epochs, rate and batch are those of
    the published SPKD; what the digits gave is in docs/methods.md.
    """

    name: ClassVar[str] = "pl-spkd"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="PL_SPKD",
        reads="forget, then retain",
        formula="as pseudo-label, then as spkd",
        cost="4/3",
        source="Rethinking Unlearning for Transfer Learning, code",
    )

    def __post_init__(self) -> None:
        """Refuse values outside their range, and an ascent where there is none."""
        super().__post_init__()
        if self.ascent != "unbounded":
            raise InputError(
                f"got ascent {self.ascent} for pl-spkd, whose first pass learns labels; expected "
                "none; leave it out, or use spkd",
                option="ascent",
            )

    def check(self, run: Run) -> None:
        """Refuse a request of all classes, too, which leaves no label."""
        require_retained_class(run, self.name)
        super().check(run)

    def forget_phase(self, run: Run, teacher: Classifier, slot: str) -> Phase:
        """Learn the pseudo-labels."""
        loss = pseudo_label_loss(run, teacher)
        return Phase("relabel", "forget", loss, self.forget_batch_norm, slot)
