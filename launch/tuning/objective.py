"""What a search makes small, and the images it is measured on.

A keyed share of the training images is measured, and none of them is read by the runs of the search
as retained; of a request of classes, none as forgotten either. The held-out images stay unread,
but for one number where nothing else says how much a network knows of what it never saw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.engine.health import measure_pair
from letheon.engine.method import Run
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.kernels import keyed
from letheon.loaders.batch import Loader
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import Request, request_samples
from letheon.loaders.views import SubsetImages

STREAM = "tuning-split"


@dataclass(frozen=True)
class Target:
    """What the accuracies on the measured images are compared with; fractions."""

    forget: float
    retain: float
    two_sided: bool
    """Whether more retain accuracy than that is a gap, too."""
    knowledge: str
    """Where the numbers come from, for the report."""

    def gap(self, forget: float, retain: float) -> float:
        """Mean of the two differences, 0 to 1."""
        short = self.retain - retain
        return (abs(forget - self.forget) + (abs(short) if self.two_sided else max(short, 0.0))) / 2


@dataclass(frozen=True)
class Division:
    """Training images divided into those that runs of the search read and those measured."""

    data: Data
    """What the runs read, as training images; what is measured, as held-out ones."""
    forget: NDArray[np.bool_]
    """(n,) of the measured images: which are to be forgotten."""
    request: Request
    """The request, in the numbers of the images that the runs read."""


def divide(
    data: Data, forget: NDArray[np.bool_], request: Request, share: float, seed: int
) -> Division:
    """Measure a keyed `share` of each class's retain and forget images, at least one of each.

    Single samples to forget are all read and all measured: no other sample stands for them.

    Raises:
        InputError: a share outside 0..1, or too few images to divide.
    """
    if not 0 < share < 1:
        raise InputError(
            f"got the share {share}; expected one between 0 and 1", option="validation_share"
        )
    labels = data.train.labels
    measured = np.zeros(len(labels), np.bool_)
    order = keyed.permutation(seed, STREAM, 0, len(labels)).numpy()
    for kind in (forget, ~forget):
        for label in np.unique(labels[kind]):
            members = order[(kind & (labels == label))[order]]
            measured[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    if request.samples is not None:
        measured[forget] = False
    if not (measured & ~forget).any():
        raise InputError(
            f"got {len(labels)} training images, too few to measure a share of {share}; expected "
            "two or more of a class; use more images",
            option="validation_share",
        )
    kept = np.flatnonzero(~measured)
    if request.samples is not None:
        measured |= forget
        train = SubsetImages(data.train, kept)
        places = np.flatnonzero(forget[kept]).tolist()
        request = request_samples(request.text, places, dataclasses.replace(data, train=train))
    rows = np.flatnonzero(measured)
    part = Data(
        SubsetImages(data.train, kept), SubsetImages(data.train, rows), data.names, data.notes
    )
    if request.samples is None and not forget[rows].any():
        raise InputError(
            "got a class to forget of one training image; expected two or more, one to be measured"
        )
    return Division(part, forget[rows], request)


def accuracies(run: Run, model: Classifier, loader: Loader) -> tuple[float, float]:
    """Top-1 accuracy of a model on the measured forget and retain images, by the run's means."""
    device = run.ranks.device
    one = dataclasses.replace(run, model=model.to(device))
    values = measure_pair(one, loader)
    assert values[0] is not None and values[1] is not None
    return values[0], values[1]


def target_of_retrained(pairs: Sequence[tuple[float, float]], name: str) -> Target:
    """Compare with retrained models: both accuracies should be theirs."""
    forget, retain = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
    return Target(forget, retain, True, f"the retrained model {name}, on the measured images")


def target_without(
    original: tuple[float, float], unseen: float | None, wish: float | None
) -> Target:
    """Compare with what is known without a retrained model.

    A network never answers a class it has not seen: 0 of a class that is to be forgotten. Of single
    samples, it is right as often as the original is on images that it has not seen.

    Args:
        original: its accuracies on the measured images.
        unseen: its accuracy on held-out images, for a request of samples.
        wish: the forget accuracy that the user aims at; wins over both.
    """
    kept = "and the original's own accuracy on the measured retain images, to be kept"
    if wish is not None:
        return Target(wish, original[1], False, f"a forget accuracy of {wish} by request, {kept}")
    if unseen is None:
        known = "that a network never answers a class it has not seen (forget accuracy 0)"
        return Target(0.0, original[1], False, f"no retrained model; {known}, {kept}")
    known = f"the original's accuracy on a keyed half of the held-out images ({unseen:.4f})"
    return Target(unseen, original[1], False, f"no retrained model; {known}, {kept}")
