"""Metrics of a method rather than a model: several runs of it against several retrained models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from letheon.errors import InputError
from letheon.eval.inference.passes import Passes
from letheon.eval.membership.challenge import challenge_score, forgetting_quality
from letheon.eval.membership.evaluator import some
from letheon.eval.membership.many_models import klom, u_lira
from letheon.eval.membership.signals import margin
from letheon.eval.row_builder import Findings, needed

LEAST = 3
"""Models of each kind."""
_ASKED = 2_000  # forget images, at most
_CHALLENGED = 200  # of them, evenly, for the challenge's score, which takes 0.1 s an image


def margins(model: Passes) -> Tensor:
    """(n,) margins of the forget images that `ensemble` asks about, the same for every model."""
    train = model.outputs["train"]
    rows = some(train.forget, _ASKED)
    return margin(train.logits[rows], train.labels[rows])


@dataclass(frozen=True)
class Runs:
    """Models that differ by the seed alone."""

    margins: Sequence[Tensor]  # (n,) `margins` of each
    accuracies: Mapping[str, float | None]  # RA and TRA, means over the models

    def accuracy(self, key: str) -> float:
        """One of the mean accuracies; an InputError where it is not known."""
        return needed(self.accuracies.get(key), f"got no {key}: no samples")


def ensemble(unlearned: Runs, retrained: Runs) -> Findings:
    """U-LiRA, KLOM and the challenge's score of one method; the same for each of its runs.

    Args:
        unlearned: the runs of the method.
        retrained: the retrained models.
    """

    def of_method() -> dict[str, Any]:
        counts = len(unlearned.margins), len(retrained.margins)
        if min(counts) < LEAST:
            raise InputError(
                f"got {counts[0]} runs of this method and {counts[1]} retrained models; "
                f"needs {LEAST} of each, with different seeds"
            )
        ours, theirs = (torch.stack(list(side.margins)) for side in (unlearned, retrained))
        divergence = klom(ours, theirs)
        every = -(-ours.shape[1] // _CHALLENGED)
        quality = forgetting_quality(ours[:, ::every], theirs[:, ::every])
        retain, test = ((unlearned.accuracy(key), retrained.accuracy(key)) for key in ("RA", "TRA"))
        return {
            "u_lira": u_lira(ours, theirs).accuracy,
            "klom_mean": float(divergence.mean()),
            "klom_p95": float(np.percentile(divergence, 95)),
            "challenge_quality": quality,
            "challenge_score": challenge_score(quality, retain, test),
        }

    found = Findings()
    keys = ("u_lira", "klom_mean", "klom_p95", "challenge_quality", "challenge_score")
    found.add(keys, of_method)
    return found
