"""The remarks of the verdict, counted on retrained models of which each should be said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scipy import stats

from letheon.eval.audit.remarks import REMARKS, count_remarks, list_remarks
from letheon.eval.audit.tables import as_audit, as_audit_json
from letheon.eval.report import verdict

COUNT = verdict.ORACLES + 6
ODD: dict[str, dict[str, Any]] = {
    "is not one of the retrained models": {"RA": 0.2, "FA": 0.9, "UA": 0.1},
    "closer to the original model": {"closer_to_retrained": 0.0},
    "no side: it lost what was to be kept": {"TRA": 0.3},
    "but its answers lie N times as far": {"margin_distance": 9.0},
    "but its features are more like the original's": {"cka_original": 0.99},
    "but it still names held-out images of the forgotten classes": {"TFA": 0.9},
    "but with one learned offset it names forget images": {"attack_prompt": 0.9},
    "but with weights of 4 bits it names forget images": {"attack_quantized": 0.9},
    "but as it learns from retain images it names forget images": {"attack_retain_only": 0.9},
}
"""What is to be said of one retrained model -> the numbers that make it so."""


def table() -> list[dict[str, Any]]:
    """An original and retrained models that answer alike, but for the last ones."""
    kinds = {"classes": list("abcd"), "forgotten": [1]}
    attacks = ("attack_prompt", "attack_quantized", "attack_retain_only")
    original = {"name": "o", "role": "original", **kinds, "RA": 0.9, "FA": 1.0, "UA": 0.0}
    original |= {"TRA": 0.9, "TFA": 0.95, **dict.fromkeys(attacks, 1.0)}
    rows = []
    for i in range(COUNT):
        wave = 0.01 * ((7 * i) % COUNT) / COUNT
        rows.append(
            {"name": f"r{i}", "role": "retrained", **kinds, "closer_p": 1e-9, "TRA": 0.9 - wave}
            | {"closer_to_retrained": 0.99 - wave, "margin_distance": 1 + wave, "RA": 0.9 + wave}
            | {"FA": wave, "UA": 1 - wave}
            | {"cka_original": 0.5 + wave, "TFA": wave, **dict.fromkeys(attacks, wave)}
        )
    for row, odd in zip(rows[-len(ODD) :], ODD.values(), strict=True):
        row.update(odd)
    return [original, *rows]


def test_each_remark_is_counted_of_the_retrained_models_it_is_said_of() -> None:
    rows = table()
    found = {each.remark: each for each in count_remarks(rows)}
    assert set(found) == {*REMARKS.values(), "any of them"}
    for i, remark in enumerate(ODD):
        name = f"r{COUNT - len(ODD) + i}"
        assert found[remark].models == (name,), remark
    assert found["no side: as near as models of the other side"].models == ()
    assert len(found["any of them"].models) == len(ODD) and found["any of them"].judged == COUNT
    low, high = found["closer to the original model"].interval  # of 1 of COUNT
    assert stats.binom.sf(0, COUNT, low) == pytest.approx(0.025)
    assert stats.binom.cdf(1, COUNT, high) == pytest.approx(0.025)


def test_two_that_are_as_near_the_original_are_on_no_side() -> None:
    rows = table()
    rows[1]["closer_to_retrained"] = 0.0  # as of the one that is closer to the original
    found = {each.remark: each.models for each in count_remarks(rows)}
    closer = f"r{COUNT - len(ODD) + [*ODD].index('closer to the original model')}"
    assert found["no side: as near as models of the other side"] == ("r0", closer)
    assert found["closer to the original model"] == ()


def test_the_audit_has_the_remarks_and_marks_those_that_are_no_evidence() -> None:
    rows = table()
    text = as_audit(rows)
    assert f"| closer to the original model | 1 of {COUNT} | 4.0% |" in text
    assert f"| any of them | {len(ODD)} of {COUNT} | **36.0%** |" in text
    (first, *_) = [r for r in json.loads(as_audit_json(rows))["remarks"] if r["models"]]
    assert first["judged"] == COUNT and len(first["interval"]) == 2


def test_too_few_models_for_a_p_value_are_not_counted() -> None:
    rows = [row for row in table() if row["name"] in {f"r{i}" for i in range(verdict.ORACLES)}]
    assert count_remarks(table()[1:]) == [] and count_remarks([table()[0], *rows]) == []
    assert list(list_remarks(rows)) == [] and "each remark" not in as_audit(rows)
