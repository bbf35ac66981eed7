"""No-op: a control that leaves the model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from letheon.engine.method import Definition, Kind, Method
from letheon.engine.recipe import Recipe


@dataclass(frozen=True)
class NoOp(Method):
    """Do nothing: the original under the name of a method, for a row that every test must catch."""

    name: ClassVar[str] = "no-op"
    elementwise: ClassVar[bool] = True
    definition: ClassVar[Definition] = Definition(
        alias="the original, a control",
        reads="none",
        formula="nothing",
        cost="0",
        source="",
    )
    kind: ClassVar[Kind] = "control"
    recipe: Recipe = Recipe(epochs=0)
