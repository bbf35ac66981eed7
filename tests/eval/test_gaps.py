"""Aggregate scores by hand, and the reference as a distribution."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import bootstrap

from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.metrics import reference, scores
from letheon.eval.report import verdict
from letheon.eval.report.page import page
from letheon.eval.report.rows import prepare
from letheon.eval.report.tables import as_markdown, as_text

RETRAINED = {
    "FA": 0.0,
    "RA": 0.99,
    "TFA": 0.0,
    "TRA": 0.94,
    "svc_efficacy_confidence": 1.0,
    "cka_retrained": 0.9,
    "knn": 0.6,
}
ORIGINAL = {"FA": 0.99, "RA": 0.99, "TFA": 0.92, "TRA": 0.95}
MODEL = {
    "name": "SalUn",
    "FA": 0.02,
    "RA": 0.97,
    "TFA": 0.03,
    "TRA": 0.90,
    "svc_efficacy_confidence": 0.95,
    "cka_retrained": 0.7,
    "knn": 0.65,
    "counts": {"FA": [1, 50]},
    "why": None,
}


def test_scores_by_hand() -> None:
    found = scores.scores(MODEL, ORIGINAL, RETRAINED)
    agl = 0.98 * 0.98 * 0.97 * 0.96
    agr = 0.8 * 0.95
    want = {
        "average_gap": (0.02 + 0.02 + 0.04 + 0.05) / 4,
        "tow": 0.98 * 0.98 * 0.96,
        "tow_mia": 0.95 * 0.98 * 0.96,
        "agl": agl,
        "agr": agr,
        "h_lr": 2 * agl * agr / (agl + agr),
        "aus": (1 - (0.95 - 0.90)) / (1 + 0.03),
        "h_mean": 2 * 0.89 * 0.90 / (0.89 + 0.90),
    }
    assert found == pytest.approx(want)


def test_the_reference_itself_is_ideal() -> None:
    found = scores.scores(RETRAINED, ORIGINAL, RETRAINED)
    assert found["average_gap"] == 0
    assert all(found[name] == 1 for name in ("tow", "tow_mia", "agl", "agr", "h_lr"))


def test_what_was_not_measured_leaves_scores_out() -> None:
    only = {"FA": 0.1, "RA": 0.9, "TRA": 0.9, "svc_efficacy_confidence": None}
    assert set(scores.scores(only, None, RETRAINED)) == {"tow"}
    assert scores.scores(only, None, None) == {}
    with pytest.raises(NotMeasurable, match="no svc_efficacy_confidence of the audited"):
        scores.average_gap(only, RETRAINED)


def test_per_cent_is_refused_everywhere() -> None:
    with pytest.raises(InputError, match="not per cent"):
        scores.scores(MODEL | {"RA": 97.0}, ORIGINAL, RETRAINED)
    with pytest.raises(InputError, match="not per cent"):
        scores.tow(MODEL, RETRAINED | {"TRA": 94.0})


def test_h_mean_of_a_model_that_forgot_nothing_is_zero() -> None:
    assert scores.h_mean({"TRA": 0.9, "TFA": 0.95}, ORIGINAL) == 0
    assert scores.h_mean({"TRA": 0.0, "TFA": 0.95}, ORIGINAL) == 0


def test_agr_takes_one_where_retrained_models_were_not_compared() -> None:
    alone = {k: v for k, v in RETRAINED.items() if k != "cka_retrained"}
    assert scores.agr(MODEL, alone) == pytest.approx((1 - 0.3) * 0.95)


def test_band_is_mean_std_and_bootstrap() -> None:
    values = np.array([0.90, 0.92, 0.95, 0.91, 0.97])
    got = reference.band(values, seed=1)
    assert got.mean == pytest.approx(values.mean())
    assert got.std == pytest.approx(values.std(ddof=1))
    want = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0)
    assert got.low == pytest.approx(want.confidence_interval.low, abs=2e-3)
    assert got.high == pytest.approx(want.confidence_interval.high, abs=2e-3)
    assert got == reference.band(values, seed=1)
    assert reference.band([0.5] * 4) == reference.Band(0.5, 0.0, 0.5, 0.5, 4)


def test_one_seed_has_no_band_and_says_so() -> None:
    one = reference.reference([RETRAINED])
    assert one.bands["FA"] == reference.Band(0.0, None, None, None, 1)
    assert "no band" in one.sentence
    three = reference.reference([RETRAINED | {"seed": s, "RA": 0.9 + s / 100} for s in range(3)])
    assert "3 retrained models" in three.sentence
    assert three.mean["RA"] == pytest.approx(0.91)
    assert three.bands["RA"].std == pytest.approx(0.01)
    assert "seed" not in three.mean


def test_a_metric_that_one_seed_lacks_counts_the_others() -> None:
    found = reference.reference([RETRAINED | {"cka_retrained": None}, RETRAINED, RETRAINED])
    assert found.bands["cka_retrained"].seeds == 2
    assert found.seeds == 3


def test_bad_references_are_the_users_error() -> None:
    with pytest.raises(InputError, match="no retrained"):
        reference.reference([])
    with pytest.raises(RunFailed, match="NaN"):
        reference.reference([{"RA": float("nan")}])


def oracle_rows(count: int, seed: int = 0, shift: float = 0.0) -> list[dict[str, object]]:
    """Rows of models whose accuracies are drawn alike, around a place that may be shifted."""
    draw = np.random.default_rng(seed)
    places = {"FA": 0.1 + shift, "RA": 0.9, "TFA": 0.1 + shift, "TRA": 0.8}
    return [
        {"name": f"r{i}", "role": "retrained"}
        | {key: float(place + 0.01 * draw.normal()) for key, place in places.items()}
        for i in range(count)
    ]


def test_a_retrained_model_is_flagged_at_no_more_than_the_level() -> None:
    flagged = [
        verdict.p_value(model, others) <= verdict.LEVEL
        for seed in range(300)
        for model, *others in [oracle_rows(verdict.ORACLES + 1, seed)]
    ]
    assert np.mean(flagged) < 0.09  # 0.05 is expected; its standard error is 0.013


def test_a_leak_of_known_size_is_found() -> None:
    retrained = oracle_rows(verdict.ORACLES)
    (leaks,) = oracle_rows(1, 1, shift=0.5)
    assert verdict.p_value(leaks, retrained) == pytest.approx(1 / 20)


def test_the_verdict_is_one_line_a_model() -> None:
    original = {"name": "before", "role": "original", "FA": 1.0, "RA": 0.9, "TFA": 0.8, "TRA": 0.8}
    kept = {**original, "name": "kept", "role": "control", "FA": 0.98}
    (good,) = oracle_rows(1, 7)
    good |= {"name": "good", "role": "unlearned"}
    many = [original, *oracle_rows(20), good, kept]
    near, far = verdict.judge(many)
    assert near.startswith("good: closer to the retrained models; could be one of the 20")
    assert far.startswith("kept: closer to the original model; is not one of the 20")
    few = verdict.judge([original, *oracle_rows(3), good])
    assert few == [
        "good: closer to the retrained models; whether it could be one of the retrained models is "
        "not decidable from 3: a p-value of 5% needs 19"
    ]
    both = verdict.judge([original, *oracle_rows(3), good, {**good, "name": "twin"}])
    assert both == [few[0].replace("good: ", "good, twin: each ")]
    assert verdict.judge([original, good]) == []
    assert "verdict: " + few[0] in as_text(prepare([original, *oracle_rows(3), good]))


def test_no_number_that_tells_the_sides_apart_is_no_verdict() -> None:
    alike = {"name": "a", "FA": 0.5, "RA": 0.5}
    assert verdict.is_closer_to_retrained(alike, alike, [alike, alike]) is None
    original = {"name": "o", "FA": 1.0, "RA": 0.5}
    assert verdict.is_closer_to_retrained(alike, original, [alike, alike]) is True
    assert verdict.is_closer_to_retrained(original, original, [alike, alike]) is False


def test_canaries_speak_without_a_retrained_model() -> None:
    recalled = {"canary_recovery": 0.25, "canary_chance": 0.1, "canary_rank": 0.8,
                "canary_p": 0.0004, "canaries": {"forget": 40}}  # fmt: skip
    before = {"name": "before", "role": "original", **recalled, "canary_recovery": 0.95}
    ignorant = {**before, "canary_p": 0.2}
    (empty,) = verdict.judge([ignorant, {"name": "kept", "role": "unlearned", **recalled}])
    assert empty.endswith("the original itself had not learned them (p = 0.200): they say nothing")
    (line,) = verdict.judge([before, {"name": "kept", "role": "unlearned", **recalled}])
    assert line == (
        "kept: names 25.0% of 40 canaries by their planted label (chance 10.0%, original 95.0%), "
        "which ranks above 80% of the wrong ones (50% if never seen), p < 0.001"
    )
    # Rows from elsewhere, or of a request that was ranked, may lack what the sentence says.
    for key in ("canary_chance", "canary_rank", "canaries"):
        for row in ({**recalled, key: None}, {k: v for k, v in recalled.items() if k != key}):
            assert verdict.judge([before, {"name": "kept", "role": "unlearned", **row}]) == []
    (line,) = verdict.judge([{"name": "o", "role": "original"},
                             {"name": "kept", "role": "unlearned", **recalled}])  # fmt: skip
    assert "(chance 10.0%), which" in line


def test_no_score_stands_without_the_disagreement() -> None:
    rows = [
        {"name": f"m{i}", "role": "unlearned", "FA": i / 10, "RA": 1 - i / 10} for i in range(4)
    ]
    assert verdict.tell_disagreement(rows[:1]) == []
    (few,) = verdict.tell_disagreement(rows[:3])
    assert "cannot be told from 3 models" in few
    assert few in as_text(prepare(rows[:3])) and few in as_markdown(prepare(rows[:3]))
    retrained = [{**row, "name": f"r{i}", "role": "retrained"} for i, row in enumerate(rows[:2])]
    (many,) = verdict.tell_disagreement([*retrained, *rows])
    assert "mean Kendall tau of" in many
    assert many in page(prepare([*retrained, *rows]), (), "x")


def test_the_mean_without_each_row_is_that_of_the_others_to_the_bit() -> None:
    draw = random.Random(1)
    rows = [{"FA": draw.random(), "RA": draw.random(), "name": str(k)} for k in range(11)]
    rows[3]["only"] = 0.5
    del rows[5]["RA"]
    means = reference.means_without_each(rows)
    assert means == [reference.mean_row([row for row in rows if row is not one]) for one in rows]
    assert "only" in means[0] and "only" not in means[3]
