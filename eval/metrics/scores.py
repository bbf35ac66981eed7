"""One number for "how far from the retrained models".

Rows are those of `measure`, shares in [0, 1] by name: FA, RA, TFA, TRA (accuracy on forget and
retain training images and on their held-out counterparts), svc_efficacy_confidence (what papers
call MIA), cka_retrained, knn. UA = 1 - FA and, when whole classes are forgotten, TA = TRA. The
retrained side is the mean of a `bands.Reference`; its spread is printed beside every gap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from letheon.errors import InputError
from letheon.eval.metrics.reference import Row, numbers

MIA = "svc_efficacy_confidence"
UNVERIFIED = frozenset({"agl", "agr", "h_lr", "h_mean"})
"""Scores whose published formula we have not read; every report marks them."""
_AVERAGED = ("FA", "RA", "TRA", MIA)


class _NotMeasured(InputError):
    """A score's ingredient is absent; `scores` leaves the score out."""


def _pick(row: Row, names: Sequence[str], whose: str) -> list[float]:
    known = numbers(row)
    missing = [name for name in names if name not in known]
    if missing:
        raise _NotMeasured(
            f"got no {', '.join(missing)} of the {whose} model; expected {', '.join(names)}; "
            "measure it, or leave this score out"
        )
    picked = [known[name] for name in names]
    if not all(-0.05 <= value <= 1 + 1e-9 for value in picked):  # unbiased CKA may be below 0
        raise InputError(
            f"got {dict(zip(names, picked, strict=True))} of the {whose} model; "
            "expected shares from 0 to 1, not per cent"
        )
    return [min(max(value, 0.0), 1.0) for value in picked]


def gaps(model: Row, retrained: Row, names: Sequence[str]) -> dict[str, float]:
    """|model - retrained| of each named metric, in [0, 1].

    Raises:
        InputError: a metric that one of them lacks, or that is not a share.
    """
    ours, theirs = _pick(model, names, "audited"), _pick(retrained, names, "retrained")
    return {n: abs(a - b) for n, a, b in zip(names, ours, theirs, strict=True)}


def _closeness(model: Row, retrained: Row, names: Sequence[str]) -> float:
    return float(np.prod([1 - gap for gap in gaps(model, retrained, names).values()]))


def average_gap(model: Row, retrained: Row, names: Sequence[str] = _AVERAGED) -> float:
    """Average gap (Fan et al. 2024, SalUn): mean |difference| over UA, RA, TA, MIA; 0 is ideal.

    The gap of UA is that of FA. For a forget set drawn at random give the whole test set's
    accuracy in place of TRA.
    """
    return float(np.mean(list(gaps(model, retrained, names).values())))


def tow(model: Row, retrained: Row) -> float:
    """ToW, tug of war (Zhao et al. 2024): (1 - |dFA|)(1 - |dRA|)(1 - |dTA|); 1 is ideal."""
    return _closeness(model, retrained, ("FA", "RA", "TRA"))


def tow_mia(model: Row, retrained: Row) -> float:
    """ToW-MIA (Zhao et al. 2024): ToW with the gap of the attack in place of that of FA."""
    return _closeness(model, retrained, (MIA, "RA", "TRA"))


def aus(model: Row, original: Row) -> float:
    """Adaptive unlearning score (Cotogni et al. 2023): (1 - (TRA_o - TRA_u)) / (1 + TFA_u).

    For whole classes: the held-out retain accuracy lost, over 1 + the held-out forget accuracy
    left. Larger is better; it exceeds 1 where the model gained on the original.
    """
    ours, left = _pick(model, ("TRA", "TFA"), "audited")
    (theirs,) = _pick(original, ("TRA",), "original")
    return (1 - (theirs - ours)) / (1 + left)


def h_mean(model: Row, original: Row) -> float:
    """H-Mean: harmonic mean of the drop of TFA from the original and TRA, in [0, 1].

    Our reading, from a second-hand account, of the score of Cha et al. 2024 and Zhou et al. 2025.
    A model that gained on the forget classes has drop 0, hence 0.
    """
    kept, left = _pick(model, ("TRA", "TFA"), "audited")
    (before,) = _pick(original, ("TFA",), "original")
    drop = max(0.0, before - left)
    return 2 * drop * kept / (drop + kept) if drop + kept > 0 else 0.0


def agl(model: Row, retrained: Row) -> float:
    """AGL, logit side: product of 1 - |gap| over FA, RA, TFA, TRA. Our reading, unverified.

    After the unified scores of Kim, Cha and Kim 2026 (arXiv 2503.06991), whose formulas could not
    be read. 1 is ideal.
    """
    return _closeness(model, retrained, ("FA", "RA", "TFA", "TRA"))


def agr(model: Row, retrained: Row) -> float:
    """AGR, representation side: (1 - |CKA gap|)(1 - |k-NN gap|). Our reading, unverified.

    CKA is the likeness to a retrained model: for the retrained side the mean between independent
    retrained models, or 1 where there is only one. 1 is ideal.
    """
    likeness = {"cka_retrained": 1.0, **numbers(retrained)}
    return _closeness(model, likeness, ("cka_retrained", "knn"))


def h_lr(model: Row, retrained: Row) -> float:
    """H-LR: harmonic mean of AGL and AGR. Our reading, unverified."""
    logit, representation = agl(model, retrained), agr(model, retrained)
    both = logit + representation
    return 2 * logit * representation / both if both > 0 else 0.0


_TO_RETRAINED = {
    "average_gap": average_gap,
    "tow": tow,
    "tow_mia": tow_mia,
    "agl": agl,
    "agr": agr,
    "h_lr": h_lr,
}
_TO_ORIGINAL = {"aus": aus, "h_mean": h_mean}


def scores(model: Row, original: Row | None, retrained: Row | None) -> dict[str, float]:
    """Every score above whose ingredients were measured, by name; the others are left out.

    Raises:
        InputError: an ingredient that is not a share.
    """
    found = {}
    for wanted, other in ((_TO_RETRAINED, retrained), (_TO_ORIGINAL, original)):
        for name, score in wanted.items():
            if other is not None:
                try:
                    found[name] = score(model, other)
                except _NotMeasured:
                    continue
    return found
