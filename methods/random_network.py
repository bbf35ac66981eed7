"""Random network: a control that has forgotten everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from letheon.engine.method import Definition
from letheon.engine.models.initial import fresh_seed
from letheon.methods.no_op import NoOp


@dataclass(frozen=True)
class RandomNetwork(NoOp):
    """An untrained network of the same architecture: what `retrain` with this seed starts from."""

    name: ClassVar[str] = "random-network"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="random network, a control",
        reads="none",
        formula="nothing, from new weights",
        cost="0",
        source="",
    )
    from_scratch: ClassVar[bool] = True

    def stream_seed(self, seed: int) -> int:
        """Retraining's: the seed itself would give the original's own start."""
        return fresh_seed(seed)
