"""Attacks on single samples: scores and rates from their definitions, truth that was planted."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import roc_curve

from letheon.errors import NotMeasurable
from letheon.eval.audit.sample_power import (
    Leak,
    as_sample_tables,
    largest_rates,
    measure_samples,
)
from letheon.eval.membership.roc import threshold_at_fpr, tpr_at_fpr
from letheon.eval.membership.signals import log_confidence, margin
from letheon.eval.membership.single_samples import SCORES, Answers, scores_without_each

N, K, L, M = 120, 20, 4, 200


def answers(draw: np.random.Generator, count: int, seen: Any = False) -> Answers:
    """Models whose margins rise by 3 deviations on the samples they saw."""
    hard = np.linspace(-2, 4, N)
    margins = hard + draw.normal(size=(count, N)) + 3 * np.broadcast_to(seen, (count, N))
    held = np.linspace(-2, 4, M) + draw.normal(size=(count, M))
    return Answers(margins, -np.log1p(np.exp(-margins)), -np.log1p(np.exp(-held)))


def leaks(draw: np.random.Generator, size: int, count: int) -> list[Leak]:
    found = []
    for _ in range(count):
        seen = np.zeros(N, dtype=bool)
        seen[draw.permutation(N)[:size]] = True
        found.append(Leak(f"{size} samples", answers(draw, 1, seen), seen))
    return found


def test_each_score_is_its_definition() -> None:
    draw = np.random.default_rng(0)
    retrained, originals, one = (answers(draw, k) for k in (K, L, 1))
    found = {name: score(one, retrained, originals) for name, score in SCORES.items()}
    m, r, o = one.margins[0], retrained.margins, originals.margins
    assert np.array_equal(found["margin"], m)
    z = [stats.zmap([m[i]], r[:, i], ddof=1)[0] for i in range(N)]
    assert found["LiRA, offline"] == pytest.approx(z)
    assert found["LiRA, offline, one spread"] == pytest.approx(m - r.mean(axis=0))
    ratio = [
        stats.norm(*stats.norm.fit(o[:, i])).logpdf(m[i])
        - stats.norm(*stats.norm.fit(r[:, i])).logpdf(m[i])
        for i in range(N)
    ]
    assert found["U-LiRA, originals as trained"] == pytest.approx(ratio)

    def corrected(log_p: Any) -> Any:
        return (1.3 * np.exp(log_p).mean(axis=0) + 0.7) / 2

    x = np.exp(one.log_p[0]) / corrected(retrained.log_p)
    z_ratio = np.exp(one.population[0]) / corrected(retrained.population)
    assert found["RMIA"] == pytest.approx((x[:, None] >= z_ratio).mean(axis=1))
    each = scores_without_each(SCORES["LiRA, offline"], retrained, originals)
    others = np.delete(r, 3, axis=0)
    assert each[3] == pytest.approx((r[3] - others.mean(axis=0)) / others.std(axis=0, ddof=1))
    with pytest.raises(NotMeasurable, match="2 originals"):
        SCORES["U-LiRA, originals as trained"](one, retrained, originals.select([0, 1]))


def test_the_threshold_gives_the_rate_of_the_roc_curve() -> None:
    draw = np.random.default_rng(1)
    inside, outside = draw.integers(0, 40, 300) + 6.0, draw.integers(0, 40, 700) * 1.0  # with ties
    for fpr in (0.0, 0.001, 0.01, 0.07, 0.29, 1.0):
        limit = threshold_at_fpr(outside, fpr)
        assert (outside >= limit).mean() <= fpr
        own = (inside >= limit).mean()
        false, true, _ = roc_curve(
            np.r_[np.ones(300), np.zeros(700)], np.r_[inside, outside], drop_intermediate=False
        )
        assert own == pytest.approx(true[false <= fpr + 1e-12].max())
        assert own == pytest.approx(tpr_at_fpr(inside, outside, fpr))


def test_rates_by_size_and_third_are_counts_over_the_planted_samples() -> None:
    draw = np.random.default_rng(2)
    retrained, originals = answers(draw, K), answers(draw, L, True)
    planted = [*leaks(draw, 1, 6), *leaks(draw, 10, 6)]
    powers = {
        (one.attack, one.level): one for one in measure_samples(planted, retrained, originals)
    }
    assert len(powers) == 2 * len(SCORES)
    name = "LiRA, offline, one spread"
    found = powers[name, 0.01]
    null = np.concatenate(
        [retrained.margins[k] - np.delete(retrained.margins, k, 0).mean(0) for k in range(K)]
    )
    limit = np.sort(null)[::-1][len(null) // 100]  # 24 of 2400 may lie above
    mean = retrained.margins.mean(axis=0)
    hits = [(leak, leak.answers.margins[0] - mean > limit) for leak in planted]
    large = [hit[leak.seen] for leak, hit in hits if leak.size == "10 samples"]
    rate = found.by_size["10 samples"]
    assert (rate.hits, rate.count) == (int(np.sum(large)), 60)
    assert rate.spread == pytest.approx(np.std([part.mean() for part in large], ddof=1))
    assert 30 < rate.hits < 60  # a shift of 3 against a threshold at 2.4 deviations
    fresh = [hit[~leak.seen] for leak, hit in hits]
    assert (found.fresh.hits, found.fresh.count) == (sum(map(np.sum, fresh)), 6 * 119 + 6 * 110)
    hard = mean.argsort()[: N // 3]
    of_hard = sum(int(hit[i]) for leak, hit in hits for i in hard if leak.seen[i])
    assert found.by_third["hard"].hits == of_hard
    assert sum(one.count for one in found.by_third.values()) == 66
    low, high = stats.binomtest(rate.hits, 60).proportion_ci(0.95, "exact")
    assert f"({100 * low:.1f} to {100 * high:.1f}; 60)" in rate.text
    assert found.every.hits == rate.hits + found.by_size["1 samples"].hits
    # 2400 scores of retrained models can tell 0.1 %, 600 cannot.
    assert not powers[name, 0.001].why
    few = list(measure_samples(planted, retrained.select(slice(5)), originals))
    assert "600 scores of retrained models cannot tell 0.1%" in {one.why for one in few}
    # Without originals U-LiRA has no Gaussian of those that saw a sample.
    none = list(measure_samples(planted, retrained, originals.select([])))
    assert sum("0 originals" in one.why for one in none) == 2


def test_a_model_is_accused_by_its_largest_score_at_the_level() -> None:
    draw = np.random.default_rng(3)
    retrained, originals = answers(draw, K), answers(draw, L, True)
    planted = [*leaks(draw, 1, 1), *leaks(draw, 60, 2)]
    models = list(largest_rates(planted, retrained, originals))
    found = {name: rates for name, *rates in models}
    false, by_size = found["LiRA, offline, one spread"]
    assert (false.hits, false.count) == (1, K)  # the largest of twenty, by construction
    assert by_size["60 samples"].hits == 2
    table = as_sample_tables(planted, list(measure_samples(planted, retrained, originals)), models)
    assert "| RMIA | 0.1% |" in table and "| all | 1 samples | 60 samples |" in table


def test_what_networks_learned_by_heart_is_found() -> None:
    """Mislabelled digits under a head of nearly as many features as images: memory, for certain."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:700] / 16, labels[:700].copy()
    forget = np.arange(60)
    labels[forget] = (labels[forget] + 1 + np.arange(60) % 9) % 10  # a wrong label each
    held = np.arange(500, 700)

    def train(seed: int, rows: Any) -> Answers:
        draw = np.random.default_rng(seed)
        x = np.tanh(images @ draw.normal(size=(64, 300)) / 2 + draw.normal(size=300))
        gram = x[rows].T @ x[rows] + 0.5 * np.eye(300)
        logits = torch.from_numpy(
            12 * x @ np.linalg.solve(gram, x[rows].T @ np.eye(10)[labels[rows]])
        )
        truth = torch.from_numpy(labels)
        m, p = (of(logits, truth).numpy()[None] for of in (margin, log_confidence))
        return Answers(m[:, forget], p[:, forget], p[:, held])

    kept = np.arange(60, 500)
    retrained = reduce(Answers.join, (train(seed, kept) for seed in range(20)))
    originals = reduce(Answers.join, (train(50 + k, np.arange(500)) for k in range(5)))
    planted = []
    for seed in range(100, 106):
        seen = np.isin(forget, np.random.default_rng(seed).permutation(60)[:5])
        planted.append(Leak("5 samples", train(seed, np.r_[forget[seen], kept]), seen))
    powers = measure_samples(planted, retrained, originals)
    found = {one.attack: one for one in powers if one.level == 0.01}
    for attack in ("LiRA, offline", "LiRA, offline, one spread", "U-LiRA, originals as trained"):
        power = found[attack]
        assert power.every.hits >= 28, attack
        assert power.fresh.hits / power.fresh.count < 0.05, attack
    assert found["margin"].every.hits < found["LiRA, offline, one spread"].every.hits


def test_tables_are_written_where_no_level_is_decidable() -> None:
    """Of 4 forgotten samples 20 retrained models give 80 scores, which do not tell 1 %."""
    draw = np.random.default_rng(5)

    def of_four(count: int) -> Answers:
        every = answers(draw, count)
        return Answers(every.margins[:, :4], every.log_p[:, :4], every.population)

    retrained, originals = of_four(K), of_four(L)
    planted = [Leak("1 sample", of_four(1), np.arange(4) == 0) for _ in range(2)]
    powers = list(measure_samples(planted, retrained, originals))
    assert powers and all(one.why for one in powers)
    found = as_sample_tables(planted, powers, list(largest_rates(planted, retrained, originals)))
    assert "| attack | at | false alarms | all | 1 sample |" in found
