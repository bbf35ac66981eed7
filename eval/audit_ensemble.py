"""Metrics of a method rather than a model: several runs of it against several retrained models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from letheon.eval.audit_membership import some
from letheon.eval.findings import Findings
from letheon.eval.membership_challenge import forgetting_quality
from letheon.eval.membership_models import klom, u_lira
from letheon.eval.membership_signals import margin
from letheon.eval.passes import Passes
from letheon.loaders.errors import InputError

LEAST = 3
"""Models of each kind."""
_ASKED = 2_000  # forget images, at most
_CHALLENGED = 200  # of them, evenly, for the challenge's score, which takes 0.1 s an image


def margins(model: Passes) -> Tensor:
    """(n,) margins of the forget images that `ensemble` asks about, the same for every model."""
    train = model.outputs["train"]
    rows = some(train.forget, _ASKED)
    return margin(train.logits[rows], train.labels[rows])


def ensemble(unlearned: Sequence[Tensor], retrained: Sequence[Tensor]) -> Findings:
    """U-LiRA, KLOM and the challenge's quality of one method; the same for each of its runs.

    Args:
        unlearned: (n,) `margins` of each run of the method, with different seeds.
        retrained: the same of the retrained models.
    """

    def of_method() -> dict[str, Any]:
        if min(len(unlearned), len(retrained)) < LEAST:
            raise InputError(
                f"got {len(unlearned)} runs of this method and {len(retrained)} retrained models; "
                f"needs {LEAST} of each, with different seeds"
            )
        ours, theirs = torch.stack(list(unlearned)), torch.stack(list(retrained))
        divergence = klom(ours, theirs)
        every = -(-ours.shape[1] // _CHALLENGED)
        return {
            "u_lira": u_lira(ours, theirs).accuracy,
            "klom_mean": float(divergence.mean()),
            "klom_p95": float(np.percentile(divergence, 95)),
            "challenge_quality": forgetting_quality(ours[:, ::every], theirs[:, ::every]),
        }

    found = Findings()
    found.add(("u_lira", "klom_mean", "klom_p95", "challenge_quality"), of_method)
    return found
