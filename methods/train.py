"""Ordinary training on the whole training set, through the same loop: the original model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from letheon.engine.method import Kind
from letheon.loaders.batch import Reads
from letheon.methods.retrain import FromScratch


@dataclass(frozen=True)
class Train(FromScratch):
    """Train a new network on everything, forget and retain set alike."""

    name: ClassVar[str] = "train"
    elementwise: ClassVar[bool] = True
    kind: ClassVar[Kind] = "training"
    reads: ClassVar[Reads] = "mixed"
