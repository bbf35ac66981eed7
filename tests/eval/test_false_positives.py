"""Leave-one-out rates, spreads, the order of metrics, and the three-sample comparison."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from letheon.errors import NotMeasurable
from letheon.eval.audit.agreement import agreement
from letheon.eval.audit.false_positives import (
    accusers,
    any_rate,
    deviation,
    deviations,
    false_positives,
    tolerance,
)
from letheon.eval.audit.power import as_table, measure_power
from letheon.eval.audit.tables import as_audit, as_audit_json
from letheon.eval.membership.closeness import closeness


def retrained(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    return [
        {"name": f"r{i}", "role": "retrained", "FA": 0.0, "seed": i, "why": {}}
        | {key: float(0.8 + 0.01 * draw.normal()) for key in ("RA", "TRA")}
        for i in range(count)
    ]


def test_the_tolerance_is_the_prediction_interval_of_a_normal_sample() -> None:
    draw = np.random.default_rng(0).normal(size=(20_000, 6))
    outside = [abs(deviation(row[0], row[1:])) > tolerance(5) for row in draw]
    assert np.mean(outside) == pytest.approx(0.05, abs=0.006)  # 4 standard errors
    two = [abs(deviation(row[0], row[1:])) > 2 for row in draw]
    assert np.mean(two) > 0.1


def test_each_retrained_model_is_measured_against_the_others_alone() -> None:
    rows = retrained(6)
    away = deviations(rows[2], rows)
    others = [row["RA"] for row in rows if row is not rows[2]]
    want = (rows[2]["RA"] - np.mean(others)) / np.std(others, ddof=1)
    assert away["RA"] == (pytest.approx(want), 5)
    assert away["FA"] == (0.0, 5) and "seed" not in away
    rows[4]["RA"] = 0.99
    found = false_positives(rows)
    assert found["RA"].flagged == ("r4",) and found["RA"].rate == pytest.approx(1 / 6)
    assert found["FA"].flagged == ()
    # Clopper and Pearson's end: with it, at most one of six has odds of 2.5 %.
    assert stats.binom.cdf(1, 6, found["RA"].bound) == pytest.approx(0.025)
    assert any_rate(found, 6) >= 1 / 6
    assert false_positives(rows[:2]) == {}


def test_a_model_beside_values_that_all_agree_is_accused() -> None:
    rows = retrained(5)
    leak = {**rows[0], "name": "leak", "role": "unlearned", "FA": 0.004}
    assert deviations(leak, rows)["FA"] == (np.inf, 5)
    assert "FA" in accusers(deviations(leak, rows))
    document = json.loads(as_audit_json([*rows, leak]))
    assert document["deviations"]["leak"]["FA"] is None
    assert "| leak | 1 of 3 | FA > 99 |" in as_audit([*rows, leak])


def test_metrics_are_compared_by_distance_to_their_ideals() -> None:
    rows = retrained(3)
    of = np.random.default_rng(1).random((5, 3))
    models = [
        {"name": f"m{i}", "role": "unlearned", "TRA": a, "mia_auc": b, "tow": c, "UA": a}
        for i, (a, b, c) in enumerate(of.tolist())
    ]
    ranks = agreement([*rows, *models])
    assert ranks is not None and ranks.models == 5
    assert set(ranks.keys) == {"TRA", "mia_auc", "tow"}
    mean = np.mean([row["TRA"] for row in rows])
    worth = {"TRA": np.abs(of[:, 0] - mean), "mia_auc": np.abs(of[:, 1] - 0.5), "tow": -of[:, 2]}

    def tau(first: Any, second: Any) -> float:
        signs = [np.sign((first[i] - first[j]) * (second[i] - second[j]))
                 for i, j in combinations(range(5), 2)]  # fmt: skip
        return float(np.mean(signs))

    pairs = [tau(worth[a], worth[b]) for a, b in combinations(ranks.keys, 2)]
    assert ranks.mean == pytest.approx(np.mean(pairs))
    assert ranks.worst_pairs()[0][2] == pytest.approx(min(pairs))
    assert agreement([*rows, *models[:3]]) is None


def test_closeness_is_the_sign_test_of_distances() -> None:
    after, before = np.full((3, 12), -2.0), np.full((1, 12), 4.0)
    model = np.array([-2.0] * 9 + [4.0] * 2 + [1.0])  # the last lies in the middle
    found = closeness(model, before, after)
    assert found.share == pytest.approx((9 + 0.5) / 12)
    assert found.p == pytest.approx(2 * stats.binom.cdf(2, 11, 0.5))
    same = closeness(before[0], before, after)
    assert same.share == 0 and same.p == pytest.approx(2 * 0.5**12)
    with pytest.raises(NotMeasurable, match="9 forget images"):
        closeness(model[:9], before[:, :9], after[:, :9])


def test_the_request_is_named_by_its_kind() -> None:
    rows = [{**row, "classes": ["ant", "bee"], "forgotten": [1]} for row in retrained(3)]
    assert "Whole classes were to be forgotten (bee)" in as_audit(rows)
    text = as_audit([{**row, "forgotten": []} for row in rows[:2]])
    assert "Single samples" in text and "not decidable from 2" in text


def test_power_is_the_share_of_leaks_that_are_accused() -> None:
    recalled = {"canary_rank": 0.5, "canary_recovery": 0.1}
    oracles = [{**row, **recalled, "canary_p": 0.9} for row in retrained(20)]
    for row, far in zip(oracles[:2], (0.9, 0.5), strict=True):
        row["TRA"] = far  # one retrained model of twenty is accused by this number
    like = {**oracles[5], "role": "unlearned", "canary_p": 0.5}
    small = [{**like, "name": "a"}, {**like, "name": "b", "RA": 0.5, "canary_p": 0.01}]
    large = [{**like, "name": "c", "RA": 0.2, "FA": 0.3, "canary_p": 1e-4}]
    rows = [*oracles, *small, *large]
    found = {one.title: one for one in measure_power(rows, {"2 %": "ab", "50 %": "c"})}
    assert found["RA"].rates == {"2 %": 0.5, "50 %": 1}
    assert found["FA"].rates == {"2 %": 0, "50 %": 1} and found["FA"].false_positives == 0
    assert found["TRA"].rates == {"2 %": 0, "50 %": 0}
    flagged = [row for row in oracles if "TRA" in accusers(deviations(row, oracles))]
    assert found["TRA"].false_positives == len(flagged) / 20 > 0
    canaries = found["**canaries, p of the rank (reads no retrained model)**"]
    assert canaries.rates == {"2 %": 0.5, "50 %": 1} and canaries.false_positives == 0
    assert found["**verdict: one of the retrained?**"].false_positives == pytest.approx(1 / 20)
    lines = as_table(list(found.values())).splitlines()
    assert lines[0] == "| number | false positives | leak 2 % | leak 50 % |"
    assert "| RA | " in "".join(lines) and len(lines) == 2 + len(found)
