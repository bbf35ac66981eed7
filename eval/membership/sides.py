"""The members, non-members and population that attacks on one model read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from letheon.eval.inference.passes import Passes
from letheon.eval.inference.sampling import stratified_halves
from letheon.eval.outputs import Outputs

if TYPE_CHECKING:
    from letheon.eval.case import Case


@dataclass(frozen=True)
class Sides:
    """Which samples are what to an attack; masks of the test set are over all ranks, in order."""

    members: Tensor  # rows of this rank: its part of at most MOST training images of the forget set
    matched: Tensor
    """Those of them that have a counterpart among held-out images: canaries, whose label is not
    what they show, have none, and are left out unless there is nothing else."""
    retain: Tensor  # rows of this rank: its part of at most MOST training images of the retain set
    labels: Tensor  # (n,) int64 of all held-out images
    held_out: Tensor  # (n,) bool: held-out images of the forgotten samples' classes
    population: Tensor
    """(n,) bool: images of these classes that RMIA compares with, one half of each class. Images of
    other classes would not do: beside what a model says of a class it has forgotten, they all lie
    on one side, and the attack sees nothing."""


def select_logits(outputs: Outputs, rows: Tensor) -> Outputs:
    """Select samples of this rank without their features."""
    return replace(outputs, features=outputs.features[:, :0], taps={}).where(rows)


def forget_logits(case: Case, passes: Passes) -> Outputs:
    """Select what any model of the case answers to the forget images that are attacked."""
    return select_logits(passes.outputs["train"], case.once(attack_sides).members)


def matched_logits(case: Case, passes: Passes) -> Outputs:
    """Select what any model answers to the forget images that are compared with held-out ones."""
    return select_logits(passes.outputs["train"], case.once(attack_sides).matched)


def attack_sides(case: Case) -> Sides:
    """Divide the samples of one model; every rank must call."""
    train, test = case.train, case.test
    members, retain = train.sample(train.forget), train.sample(~train.forget)
    labels = test.gather(test.labels)
    # The classes of canaries are drawn, and say nothing of what is to be forgotten.
    drawn = torch.tensor([*case.peers.canaries], dtype=torch.int64)
    matched = members[~torch.isin(train.index[members], drawn)]
    classes = train.gather(train.labels[matched]).unique()
    if not len(classes):
        matched, classes = members, train.gather(train.labels[members]).unique()
    held_out = torch.isin(labels, classes)
    every_class = bool(held_out.all())
    second = torch.zeros_like(held_out)
    places = held_out.nonzero()[:, 0]
    second[places[stratified_halves(labels[places])[1]]] = True
    if every_class:  # then the two halves are of the same classes
        held_out = ~second
    return Sides(members, matched, retain, labels, held_out, second)
