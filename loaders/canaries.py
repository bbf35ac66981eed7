"""Canaries: training images under a wrong label, whose recall is the truth about forgetting.

A network names a canary by its planted label only if it has learned that very image. The label is
drawn evenly among the wrong ones, so what a network would say that never saw the canaries is known
exactly, without any retrained model (after Carlini et al. 2019, "The Secret Sharer").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from letheon.errors import InputError
from letheon.kernels import keyed
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import forget_mask, resolve
from letheon.loaders.views import PlantedImages


@dataclass(frozen=True)
class CanaryOptions:
    """Wrong labels planted in the training images, as ground truth of forgetting."""

    canaries: int = 0
    """Training images to plant under a wrong label; who forgets them is later known for certain."""
    canaries_among: str = ""
    """Request whose images they are drawn from, such as class:3,8 or random-samples:10%, as forget
    takes it; without, all training images."""
    canaries_seed: int = 0
    """Which images they are and what they are called; all runs on a set should have the same."""


@dataclass(frozen=True)
class Canaries:
    """Which training images stand under which wrong label."""

    numbers: tuple[int, ...]  # of the training images, increasing
    labels: tuple[int, ...]  # planted
    true_labels: tuple[int, ...]
    images: int  # of the training set
    digest: str  # SHA-256 in hex of all of the above

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], where: object) -> Canaries:
        """Read canaries from the JSON of their fields; `where` names it in messages.

        Raises:
            InputError: a field is missing, or they do not have the digest beside them.
        """
        try:
            found = cls(
                tuple(map(int, facts["numbers"])), tuple(map(int, facts["labels"])),
                tuple(map(int, facts["true_labels"])), int(facts["images"]), str(facts["digest"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"got the canaries of {where}, which cannot be read ({error!r}), expected their "
                "numbers, labels and digest; copy the file again"
            ) from None
        if _digest(found) != found.digest:
            raise InputError(
                f"got the canaries of {where} with digest {_digest(found)[:12]}, expected "
                f"{found.digest[:12]}, which stands beside them; copy the file again"
            )
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """Count and digest, for a record."""
        return {"count": len(self.numbers), "digest": self.digest}


def _digest(of: Canaries) -> str:
    parts = [of.numbers, of.labels, of.true_labels, of.images]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def draw_canaries(options: CanaryOptions, data: Data, seed: int) -> Canaries | None:
    """Draw images and their wrong labels; None where none are wanted.

    Both follow from `canaries_seed` and the images' numbers; the label is even over the others.

    Args:
        options: how many, and among which.
        data: before anything was planted.
        seed: of the request they are drawn from, where it draws.

    Raises:
        InputError: a count below 0, or above that of the images.
    """
    count, classes = options.canaries, len(data.classes)
    if not count:
        if options.canaries_among:
            raise InputError(
                f"got canaries among {options.canaries_among}, but none; say how many",
                option="canaries_among",
            )
        return None
    labels = data.train.labels
    among = np.arange(len(labels))
    if options.canaries_among:
        among = np.flatnonzero(forget_mask(resolve(options.canaries_among, data, seed), labels))
    if not 0 < count <= len(among):
        raise InputError(
            f"got {count} canaries of {len(among)} images, expected 1 to {len(among)}; plant fewer",
            option="canaries",
        )
    order = keyed.permutation(options.canaries_seed, "canaries", 0, len(among))[:count].numpy()
    numbers = np.sort(among[order])
    draws = keyed.uniform(options.canaries_seed, "canary-labels", 0, torch.from_numpy(numbers), 1)
    wrong = (draws[:, 0].numpy() * (classes - 1)).astype(np.int64)
    wrong += wrong >= labels[numbers]
    true = labels[numbers].tolist()
    found = Canaries(tuple(numbers.tolist()), tuple(wrong.tolist()), tuple(true), len(labels), "")
    return replace(found, digest=_digest(found))


def plant(data: Data, canaries: Canaries | None) -> Data:
    """Return the data with the canaries' wrong labels; itself where there are none.

    Raises:
        InputError: these are not the images that the canaries were planted in.
    """
    if canaries is None:
        return data
    numbers = np.array(canaries.numbers)
    labels = data.train.labels
    if len(labels) != canaries.images or (labels[numbers] != canaries.true_labels).any():
        raise InputError(
            f"got a model with {len(numbers)} canaries in {canaries.images} training images, and "
            f"{len(labels)} images of other labels, expected those it was trained on; give these",
            option="data",
        )
    train = PlantedImages(data.train, numbers, np.array(canaries.labels))
    note = f"{len(numbers)} canaries: training images under a wrong label"
    train.notes = (*train.notes, note)
    return replace(data, train=train, test=train if data.test is data.train else data.test)
