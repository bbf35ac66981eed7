"""The members, non-members and population that attacks on one model read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from letheon.eval.inference.sampling import sample_rows
from letheon.eval.outputs import Outputs

if TYPE_CHECKING:
    from letheon.eval.case import Case


@dataclass(frozen=True)
class Sides:
    """Outputs by what they are to an attack."""

    forget: Outputs  # at most MOST training images
    retain: Outputs  # at most MOST training images
    test: Outputs  # all held-out images
    held_out: Tensor  # (n,) bool: held-out images of the forgotten samples' classes
    population: Tensor  # (n,) bool: the rest; where every class is asked about, every second image


def attack_sides(case: Case) -> Sides:
    """Divide the passes of one model."""
    train, test = case.train, case.test
    forget = train.where(sample_rows(train.forget))
    retain = train.where(sample_rows(~train.forget))
    held_out = torch.isin(test.labels, forget.labels.unique())
    if bool(held_out.all()):
        held_out = torch.arange(len(test)) % 2 == 0
    return Sides(forget, retain, test, held_out, ~held_out)
