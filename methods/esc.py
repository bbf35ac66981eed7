"""ESC: erase the feature directions of the forget set from what the head reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from letheon.engine.checkpoints.method_state import State
from letheon.engine.method import Definition, Method, Run
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import input_covariances
from letheon.errors import InputError
from letheon.methods.requirements import require_samples


@dataclass(frozen=True)
class Esc(Method):
    """ESC: drop the leading directions of the forget set's features before the last layer.

    With U the left singular vectors of the forget features (uncentered), the first share p of them
    are dropped: the head's weight W becomes W (I - U_p U_p^T), which is the same as projecting the
    features (Lee et al. 2025, "ESC: Erasing Space Concept for Knowledge Deletion"). The encoder
    stays bitwise what it was, so probes of the features find what they found; see
    `head-distillation`.

    p 0.015 is published; at least one direction is dropped. ESC-T, which learns a mask of the
    directions, is not here. Reads the forget set once.
    """

    name: ClassVar[str] = "esc"
    definition: ClassVar[Definition] = Definition(
        alias="ESC",
        reads="forget, once",
        formula="W (I - U U^T) in the head, U the leading directions of forget features; the "
        "encoder stays",
        cost="N_f l",
        source="Lee et al. 2025",
    )
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"share": (0.001, 0.5)}
    elementwise: ClassVar[bool] = True
    recipe: Recipe = Recipe(epochs=0)
    share: float = 0.015
    """p, of the D directions."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.share < 1:
            raise InputError(f"got share {self.share}; expected 0 < share < 1", option="share")

    def check(self, run: Run) -> None:
        """Refuse a request without a forget sample."""
        require_samples(run, self.name, retain=False)

    def prepare(self, run: Run) -> State:
        """Project the head."""
        path, weight = run.model.head_path, run.own_parameter(run.model.head.weight)
        _, vectors = torch.linalg.eigh(input_covariances(run, "forget", [path])[path])
        leading = vectors[:, -math.ceil(self.share * len(vectors)) :]  # (D, k)
        with torch.no_grad():
            rows = weight.double()
            weight.copy_(rows - (rows @ leading) @ leading.T)
        return State()
