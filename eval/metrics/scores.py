"""One number for "how far from the retrained models".

Rows are those of `build_row`, shares in [0, 1] by name: FA, RA, TFA, TRA (accuracy on forget and
retain training images and on their held-out counterparts), svc_efficacy_confidence (what papers
call MIA), cka_retrained, knn. UA = 1 - FA and, when whole classes are forgotten, TA = TRA. The
retrained side is the mean of a `reference.Reference`; its spread is printed beside every gap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from letheon.errors import InputError, NotMeasurable
from letheon.eval.metrics.reference import Row, numbers
from letheon.eval.metrics.registry import metric, metrics

MIA = "svc_efficacy_confidence"
_GROUP = "Distance to the retrained models"
_AVERAGED = ("FA", "RA", "TRA", MIA)


def _pick(row: Row, names: Sequence[str], whose: str) -> list[float]:
    """Pick the named shares of a row; `whose` row it is, for messages."""
    known = numbers(row)
    missing = [name for name in names if name not in known]
    if missing:
        raise NotMeasurable(
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
    """Compute |model - retrained| of each named metric, in [0, 1].

    Raises:
        NotMeasurable: a metric that one of them lacks.
        InputError: a metric that is not a share.
    """
    ours, others = _pick(model, names, "audited"), _pick(retrained, names, "retrained")
    return {n: abs(a - b) for n, a, b in zip(names, ours, others, strict=True)}


def _closeness(model: Row, retrained: Row, names: Sequence[str]) -> float:
    return float(np.prod([1 - gap for gap in gaps(model, retrained, names).values()]))


def _harmonic_mean(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second > 0 else 0.0


@metric(
    "average_gap", title="Average gap", group=_GROUP, unit="share", better="low", stage="scores",
    needs=("retrained",), place=2, source="Fan et al. 2024, SalUn",
)  # fmt: skip
def average_gap(model: Row, retrained: Row) -> float:
    """Mean of |model - retrained| over UA, RA, TA (here TRA) and MIA (here SVC-efficacy on
    confidence), in percentage points. The gap of UA is that of FA.
    """
    return float(np.mean(list(gaps(model, retrained, _AVERAGED).values())))


@metric(
    "tow", title="ToW", group=_GROUP, better="high", stage="scores",
    needs=("retrained",), place=3, source="Zhao et al. 2024",
)  # fmt: skip
def tow(model: Row, retrained: Row) -> float:
    """Tug of war: (1 - |dFA|)(1 - |dRA|)(1 - |dTA|), differences to the retrained model; between 0
    and 1.
    """
    return _closeness(model, retrained, ("FA", "RA", "TRA"))


@metric(
    "tow_mia", title="ToW-MIA", group=_GROUP, better="high", stage="scores",
    needs=("retrained",), place=4, source="Zhao et al. 2024",
)  # fmt: skip
def tow_mia(model: Row, retrained: Row) -> float:
    """ToW with the gap of the membership attack in place of the forget accuracy's."""
    return _closeness(model, retrained, (MIA, "RA", "TRA"))


@metric(
    "aus", title="AUS", group=_GROUP, better="high", stage="scores",
    needs=("original",), place=5, source="Cotogni et al. 2023",
)  # fmt: skip
def aus(model: Row, original: Row) -> float:
    """Adaptive unlearning score: (1 - (TRA of the original - TRA)) / (1 + TFA); it exceeds 1 where
    the model gained on the original.
    """
    ours, left = _pick(model, ("TRA", "TFA"), "audited")
    (before,) = _pick(original, ("TRA",), "original")
    return (1 - (before - ours)) / (1 + left)


@metric(
    "h_mean", title="H-Mean", group=_GROUP, better="high", stage="scores",
    needs=("original",), place=6, source="after Cha et al. 2024 and Zhou et al. 2025",
    verified=False,
)  # fmt: skip
def h_mean(model: Row, original: Row) -> float:
    """Harmonic mean of the drop of TFA from the original model and of TRA; 0 for a model that
    gained on the forget classes.
    """
    retain, left = _pick(model, ("TRA", "TFA"), "audited")
    (before,) = _pick(original, ("TFA",), "original")
    return _harmonic_mean(max(0.0, before - left), retain)


@metric(
    "agl", title="AGL", group=_GROUP, better="high", stage="scores",
    needs=("retrained",), place=7, source="after Kim, Cha and Kim 2026, arXiv 2503.06991",
    verified=False,
)  # fmt: skip
def agl(model: Row, retrained: Row) -> float:
    """Logit side: product of 1 - |gap to retrained| over FA, RA, TFA, TRA."""
    return _closeness(model, retrained, ("FA", "RA", "TFA", "TRA"))


@metric(
    "agr", title="AGR", group=_GROUP, better="1", stage="scores",
    needs=("retrained",), place=8, source="after Kim, Cha and Kim 2026, arXiv 2503.06991",
    verified=False,
)  # fmt: skip
def agr(model: Row, retrained: Row) -> float:
    """Representation side: (1 - |CKA gap|)(1 - |k-NN gap|). CKA is the likeness to a retrained
    model: for the retrained side the mean between independent retrained models, or 1 where there is
    one. Read it beside the original's: where that is as near 1, it cannot tell what was forgotten.
    """
    likeness = {"cka_retrained": 1.0, **numbers(retrained)}
    return _closeness(model, likeness, ("cka_retrained", "knn"))


@metric(
    "h_lr", title="H-LR", group=_GROUP, better="high", stage="scores",
    needs=("retrained",), place=9, source="after Kim, Cha and Kim 2026, arXiv 2503.06991",
    verified=False,
)  # fmt: skip
def h_lr(model: Row, retrained: Row) -> float:
    """Harmonic mean of AGL and AGR."""
    return _harmonic_mean(agl(model, retrained), agr(model, retrained))


def scores(model: Row, original: Row | None, retrained: Row | None) -> dict[str, float]:
    """Compute every score above whose ingredients were measured, by name; the others are absent.

    Args:
        model: the row of the model.
        original: the row of the original model.
        retrained: the mean over the retrained models' rows.

    Raises:
        InputError: an ingredient that is not a share.
    """
    values = {}
    for score in metrics().values():
        other = retrained if "retrained" in score.needs else original
        if score.stage == "scores" and other is not None:
            try:
                values[score.key] = score(model, other)
            except NotMeasurable:
                continue
    return values
