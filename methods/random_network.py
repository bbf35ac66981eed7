"""Random network: a control that has forgotten everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from letheon.methods.no_op import NoOp


@dataclass(frozen=True)
class RandomNetwork(NoOp):
    """An untrained network of the same architecture: what retraining with this seed starts from."""

    name: ClassVar[str] = "random-network"
    from_scratch: ClassVar[bool] = True
