"""The membership attacks of a row, from the passes of a model and of models that never saw F."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from letheon.errors import InputError
from letheon.eval.inference.extract import Outputs
from letheon.eval.inference.passes import Passes
from letheon.eval.membership.many_models import rmia
from letheon.eval.membership.roc import auc, class_matched, tpr_at_fpr
from letheon.eval.membership.signals import entropy, log_confidence, loss, margin
from letheon.eval.membership.single_model import loss_two_sample, lr_entropy, svc_efficacies
from letheon.eval.row_builder import Findings
from letheon.kernels.keyed import permutation

MOST = 20_000
"""Rows of the forget and of the retain set that the attacks read, at most, drawn once by key."""
REFERENCES = 4
"""Retrained models that RMIA reads, at most."""
_SVC = ("confidence", "entropy", "correctness", "modified_entropy", "probabilities")
_MATCHED = ("mia_auc", "mia_tpr_1pct", "mia_tpr_01pct", "mia_within_class_auc")


def membership(model: Passes, references: Sequence[Passes], found: Findings) -> None:
    """Enter every attack of the catalogue that one audited model allows.

    Non-members are held-out images: all of them for SVC-efficacy and LR-entropy, as published;
    those of the forgotten samples' classes for the others. RMIA's population is the rest of the
    held-out images; where every class is asked about, every second image.

    Args:
        model: what is attacked.
        references: models trained without the forget set, for RMIA; not `model` itself.
        found: is added to.
    """
    train, test = model.outputs["train"], model.outputs["test"]
    forget, retain = train.where(some(train.forget)), train.where(some(~train.forget))
    held, population = _sides(test, forget)

    def svc() -> dict[str, Any]:
        shares = svc_efficacies(
            (retain.logits, retain.labels),
            (test.logits, test.labels),
            (forget.logits, forget.labels),
        )
        return {f"svc_efficacy_{name.replace(' ', '_')}": share for name, share in shares.items()}

    def by_entropy() -> dict[str, Any]:
        return {"lr_entropy": lr_entropy(*(_of(entropy, side) for side in (retain, test, forget)))}

    def two_sample() -> dict[str, Any]:
        inside, outside = _of(loss, forget), _of(loss, test.where(held))
        folds = min(10, len(inside), len(outside))
        return {"loss_two_sample": loss_two_sample(inside, outside, folds=folds)}

    def matched() -> dict[str, Any]:
        of = class_matched(
            _of(margin, forget), forget.labels, _of(margin, test), test.labels
        )  # fmt: skip
        return dict(
            zip(_MATCHED, (of.auc, of.tpr_at_1pct, of.tpr_at_01pct, of.within_class_auc),
                strict=True)
        )  # fmt: skip

    def by_ratio() -> dict[str, Any]:
        return _rmia(model, references, forget.index, held, population)

    found.add(tuple(f"svc_efficacy_{name}" for name in _SVC), svc)
    found.add(("lr_entropy",), by_entropy)
    found.add(("loss_two_sample",), two_sample)
    found.add(_MATCHED, matched)
    found.add(("rmia_auc", "rmia_tpr_1pct"), by_ratio)


def some(rows: Tensor, most: int = MOST, seed: int = 0) -> Tensor:
    """(m,) increasing positions of at most `most` rows with `rows` (n,) bool, drawn by key."""
    places = rows.nonzero()[:, 0]
    return places[permutation(seed, "audit", 0, len(places))[:most]].sort().values


def _of(signal: Any, side: Outputs) -> Tensor:
    values: Tensor = signal(side.logits, side.labels)
    return values


def _sides(test: Outputs, forget: Outputs) -> tuple[Tensor, Tensor]:
    """Which held-out images are asked about, and which are the population; (n,) bool each."""
    asked = torch.isin(test.labels, forget.labels.unique())
    if bool(asked.all()):
        asked = torch.arange(len(test)) % 2 == 0
    return asked, ~asked


def _rmia(
    model: Passes, references: Sequence[Passes], members: Tensor, held: Tensor, population: Tensor
) -> dict[str, Any]:
    if not references:
        raise InputError(
            "got no retrained model besides this one; RMIA needs a model trained without the "
            "forget set: --retrained"
        )

    def parts(side: Passes) -> list[Tensor]:
        train, test = side.outputs["train"], side.outputs["test"]
        sides = ((train, members), (test, held), (test, population))
        return [log_confidence(of.logits[rows], of.labels[rows]) for of, rows in sides]

    ours = parts(model)
    inside, outside, others = (
        torch.stack(values) for values in zip(*map(parts, references[:REFERENCES]), strict=True)
    )
    scores = rmia(ours[0], inside, ours[2], others)
    held_scores = rmia(ours[1], outside, ours[2], others)
    return {
        "rmia_auc": auc(scores, held_scores),
        "rmia_tpr_1pct": tpr_at_fpr(scores, held_scores, 0.01),
    }
