"""Measure one model from its passes: accuracy, k-NN and CKA, without a run folder around it."""

from __future__ import annotations

from typing import Any

from letheon.engine.distributed import Ranks
from letheon.eval.case import Case, Conditions, Peers, Subject
from letheon.eval.inference.passes import Passes
from letheon.eval.row_builder import build_row

__all__ = ["Conditions", "measure"]


def measure(
    model: Passes,
    original: Passes | None = None,
    retrained: Passes | None = None,
    conditions: Conditions | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Compute the quick row of one model: what JSON can hold, the same on every rank.

    Args:
        model: what is measured.
        original: the model before forgetting.
        retrained: the model trained without the forget set.
        conditions: of k-NN and CKA.
        ranks: then every rank must call; the k-NN databases are shared out, and k-NN and CKA run
            on the ranks' devices. Default: on the CPU, without communication.

    Returns:
        Every metric of depth "quick" under its key, or None where it is not defined; "why" then
        has the reason. "conditions": what they were measured under, with digests of the weights.

    Raises:
        RunFailed: NaN in logits or features.
        InputError: sets that differ between the models.
    """
    subject = Subject(model)
    peers = Peers(
        None if original is None else Subject(original),
        () if retrained is None else (subject if retrained is model else Subject(retrained),),
    )
    case = Case(subject, peers, conditions or Conditions(), ranks or Ranks())
    return build_row(case).as_dict()
