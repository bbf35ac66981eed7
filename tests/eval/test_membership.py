"""Membership attacks against scikit-learn, scipy and their definitions in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax
from scipy.stats import entropy as scipy_entropy
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from letheon.errors import InputError, LetheonError, NotMeasurable, RunFailed
from letheon.eval.case import Case, Peers, Subject
from letheon.eval.inference.passes import Passes
from letheon.eval.membership import challenge as challenge
from letheon.eval.membership import many_models as models
from letheon.eval.membership import roc as curves
from letheon.eval.membership import signals as signals
from letheon.eval.membership import single_model as attacks
from letheon.eval.membership.over_seeds import Runs, SeveralRuns
from letheon.eval.membership.sides import attack_sides
from letheon.eval.outputs import Outputs
from letheon.kernels.keyed import permutation


def some_logits(n: int = 40, classes: int = 5, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(n + classes)
    logits = torch.from_numpy(scale * rng.normal(size=(n, classes)))
    return logits, torch.from_numpy(rng.integers(0, classes, n))


def by_definition(logits: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    p = np.exp(log_softmax(logits, axis=1))
    rows = np.arange(len(y))
    p_y = p[rows, y]
    terms = p * np.log(1 - p)
    terms[rows, y] = 0
    return {
        "confidence": p_y,
        "entropy": -(p * np.log(p)).sum(1),
        "correctness": (p.argmax(1) == y).astype(float),
        "modified entropy": -(1 - p_y) * np.log(p_y) - terms.sum(1),
        "loss": -np.log(p_y),
        "margin": np.log(p_y) - np.log(1 - p_y),
    }


@pytest.mark.parametrize("classes", [2, 5, 30])
def test_signals_are_their_definitions(classes: int) -> None:
    logits, y = some_logits(50, classes)
    want = by_definition(logits.numpy(), y.numpy())
    got = {name: signal(logits, y) for name, signal in signals.SIGNALS.items()}
    got |= {"loss": signals.loss(logits, y), "margin": signals.margin(logits, y)}
    assert got.keys() == want.keys()
    for name, values in got.items():
        np.testing.assert_allclose(values, want[name], rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(
        signals.probabilities(logits), np.exp(log_softmax(logits.numpy(), 1))
    )


def test_signals_stay_finite_where_the_model_is_certain() -> None:
    logits = torch.tensor([[1000.0, 0.0, 0.0], [1000.0, 0.0, 0.0]])
    y = torch.tensor([0, 1])
    assert signals.margin(logits, y).tolist() == pytest.approx([1000 - np.log(2), -1000])
    # Right and certain: nothing. Wrong and certain: (1 - 0) * 1000 and, from class 0, 1 * 1000.
    assert signals.modified_entropy(logits, y).tolist() == pytest.approx(
        [0.0, 2000 - np.log(2)], abs=1e-9
    )


def test_modified_entropy_does_not_depend_on_the_batch() -> None:
    logits, _ = some_logits(6, 4)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    ours = torch.cat([signals.modified_entropy(logits[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(ours, signals.modified_entropy(logits, y))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.full((3, 2), float("nan")), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2])),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)),
    ],
)
def test_bad_logits_and_labels_are_the_users_error(
    logits: torch.Tensor, labels: torch.Tensor
) -> None:
    with pytest.raises(LetheonError, match="got"):
        signals.margin(logits, labels)


def score_sides(case: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "ties": (rng.integers(0, 4, 300) + 1.0, rng.integers(0, 4, 500) * 1.0),
        "distinct": (rng.normal(1, 1, 120), rng.normal(0, 1, 1000)),
        "constant": (np.ones(7), np.ones(5)),
        "one each": (np.array([2.0]), np.array([1.0])),
        "reversed": (np.zeros(10), np.ones(10)),
    }[case]


@pytest.mark.parametrize("case", ["ties", "distinct", "constant", "one each", "reversed"])
def test_roc_equals_scikit_learn_with_ties(case: str) -> None:
    inside, outside = score_sides(case)
    truth = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    scores = np.concatenate([inside, outside])
    fpr, tpr, threshold = roc_curve(truth, scores, drop_intermediate=False)
    got = curves.roc(inside, outside)
    np.testing.assert_array_equal(got.fpr, fpr)
    np.testing.assert_array_equal(got.tpr, tpr)
    np.testing.assert_array_equal(got.threshold, threshold)
    assert curves.auc(inside, outside) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    for at in (0.0, 0.001, 0.01, 0.2, 1.0):
        assert curves.tpr_at_fpr(inside, outside, at) == tpr[fpr <= at].max()


def test_tpr_counts_a_rate_of_exactly_one_per_cent() -> None:
    outside = np.arange(100.0)  # one false positive is 1 %
    assert curves.tpr_at_fpr(np.array([99.0, 98.0, 200.0]), outside, 0.01) == 2 / 3


def test_class_matched_leaves_other_classes_out() -> None:
    rng = np.random.default_rng(0)
    forget, held_out = rng.normal(size=60), rng.normal(size=90)
    forget_y, held_y = np.repeat([1, 4], [40, 20]), np.repeat([1, 4, 2], [30, 20, 40])
    held_out[held_y == 2] = 50.0  # an attack that used them would be ruined
    got = curves.class_matched(forget, forget_y, held_out, held_y)
    keep = held_y != 2
    truth = np.concatenate([np.ones(60), np.zeros(50)])
    assert got.auc == pytest.approx(roc_auc_score(truth, np.r_[forget, held_out[keep]]))
    within = [curves.auc(forget[forget_y == c], held_out[held_y == c]) for c in (1, 4)]
    assert got.within_class_auc == pytest.approx((40 * within[0] + 20 * within[1]) / 60)
    assert (got.members, got.others) == (60, 50)
    with pytest.raises(NotMeasurable, match="class 4"):
        curves.class_matched(forget, forget_y, held_out[held_y != 4], held_y[held_y != 4])


def test_class_matched_one_sample_of_a_class() -> None:
    got = curves.class_matched([3.0, 1.0], np.array([0, 1]), [2.0, 2.0], np.array([0, 1]))
    assert got.within_class_auc == 0.5
    assert got.auc == 0.5


def test_svc_efficacy_is_the_published_recipe() -> None:
    rng = np.random.default_rng(1)
    retain, test, forget = rng.beta(8, 1, 60), rng.beta(2, 1, 60), rng.beta(3, 1, 25)
    clf = SVC(C=3, gamma="auto", kernel="rbf")
    clf.fit(np.r_[retain, test][:, None], np.r_[np.ones(60), np.zeros(60)])
    want = 1 - clf.predict(forget[:, None]).mean()
    got = attacks.svc_efficacy(retain[:, None], test[:, None], forget[:, None])
    assert got == pytest.approx(want)


def test_svc_efficacy_draws_members_by_seed_not_by_order() -> None:
    rng = np.random.default_rng(2)
    retain = np.sort(rng.random((400, 1)), axis=0)  # ordered by class, as files are
    test, forget = rng.random((30, 1)), rng.random((200, 1))
    first = attacks.svc_efficacy(retain, test, forget, seed=0)
    assert first == attacks.svc_efficacy(retain, test, forget, seed=0)
    # The first 30 rows are all below 0.1: the published choice calls everything else foreign.
    published = attacks.svc_efficacy(retain[:30], test, forget)
    assert published > first + 0.1


def test_svc_efficacy_takes_as_many_members_as_there_are_test_samples() -> None:
    rng = np.random.default_rng(10)
    retain, test, forget = rng.beta(4, 1, (300, 1)), rng.beta(3, 1, (60, 1)), rng.random((90, 1))
    members = retain[permutation(5, "svc members", 0, 300)[:60].sort().values.numpy()]
    clf = SVC(C=3, gamma="auto", kernel="rbf")
    clf.fit(np.r_[members, test], np.r_[np.ones(60), np.zeros(60)])
    want = 1 - clf.predict(forget).mean()
    assert attacks.svc_efficacy(retain, test, forget, seed=5) == pytest.approx(want)
    assert want not in (0, 1)


def test_svc_efficacy_reads_no_more_than_the_cap() -> None:
    rng = np.random.default_rng(8)
    retain, test, forget = (rng.random((n, 1)) for n in (300, 200, 500))
    capped = attacks.svc_efficacy(retain, test, forget, cap=40)
    assert (capped * 40) == pytest.approx(round(capped * 40))
    whole = attacks.svc_efficacy(retain, test, forget)
    assert whole == attacks.svc_efficacy(retain, test, forget, cap=500)


def test_svc_efficacy_sides_and_degenerate_features() -> None:
    high, low = np.full((20, 1), 0.9), np.full((20, 1), 0.1)
    assert attacks.svc_efficacy(high, low, low) == 1.0
    assert attacks.svc_efficacy(high, low, high) == 0.0
    assert attacks.svc_efficacy(high, high, high) in (0.0, 1.0)
    with pytest.raises(InputError, match="widths"):
        attacks.svc_efficacy(high, low, np.zeros((3, 2)))
    with pytest.raises(RunFailed, match="NaN"):
        attacks.svc_efficacy(high, low * np.nan, low)


def test_lr_entropy_is_the_share_called_member() -> None:
    rng = np.random.default_rng(4)
    retain, test, forget = rng.gamma(1, 0.2, 200), rng.gamma(2, 0.4, 50), rng.gamma(1.5, 0.4, 80)
    clf = LogisticRegression(class_weight="balanced").fit(
        np.r_[retain, test][:, None], np.r_[np.ones(200), np.zeros(50)]
    )
    want = clf.predict(forget[:, None]).mean()
    assert 0 < want < 1
    assert attacks.lr_entropy(retain, test, forget) == pytest.approx(want)
    # By hand: a member is below the entropy at which the fitted log-odds are 0.
    edge = -clf.intercept_[0] / clf.coef_[0, 0]
    assert want == (forget < edge).mean()


def test_loss_two_sample_is_chance_for_equal_and_high_for_separated_losses() -> None:
    rng = np.random.default_rng(5)
    same = rng.exponential(size=400)
    assert attacks.loss_two_sample(same[:200], same[200:]) == pytest.approx(0.5, abs=0.1)
    apart = attacks.loss_two_sample(np.zeros(50), np.full(80, 3.0))
    assert apart == 1.0
    seeded = [attacks.loss_two_sample(same[:50], same[200:] + 0.5, seed=3) for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_loss_two_sample_of_constant_losses_is_chance() -> None:
    assert attacks.loss_two_sample(np.ones(20), np.ones(20)) == pytest.approx(0.5)
    with pytest.raises(NotMeasurable, match="folds"):
        attacks.loss_two_sample(np.ones(3), np.ones(20))


def test_loss_two_sample_tests_each_sample_once() -> None:
    rng = np.random.default_rng(6)
    forget, held = rng.exponential(0.5, 23), rng.exponential(1.0, 23)
    x, y = np.r_[forget, held][:, None], np.r_[np.ones(23), np.zeros(23)]
    shares = []
    for fit, ask in StratifiedKFold(4, shuffle=True, random_state=2).split(x, y):
        clf = LogisticRegression().fit(x[fit], y[fit])
        edge = -clf.intercept_[0] / clf.coef_[0, 0]  # forget below it
        shares.append(((x[ask, 0] < edge) == (y[ask] == 1)).mean())
    got = attacks.loss_two_sample(forget, held, folds=4, seed=2)
    assert got == pytest.approx(np.mean(shares))


def rmia_by_hand(
    x: np.ndarray, x_ref: np.ndarray, z: np.ndarray, z_ref: np.ndarray, gamma: float, a: float
) -> np.ndarray:
    def ratio(p: np.ndarray, ref: np.ndarray) -> np.ndarray:
        return np.exp(p) / (((1 + a) * np.exp(ref).mean(0) + (1 - a)) / 2)

    return (ratio(x, x_ref)[:, None] / ratio(z, z_ref)[None, :] >= gamma).mean(1)


@pytest.mark.parametrize("references", [1, 2, 4])
@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_rmia_is_its_definition(references: int, a: float) -> None:
    rng = np.random.default_rng(references)
    x, z = np.log(rng.random(30)), np.log(rng.random(70))
    x_ref, z_ref = np.log(rng.random((references, 30))), np.log(rng.random((references, 70)))
    for gamma in (0.5, 1.0, 2.0):
        got = models.rmia(x, x_ref, z, z_ref, gamma=gamma, offline_a=a)
        np.testing.assert_allclose(got, rmia_by_hand(x, x_ref, z, z_ref, gamma, a))


def test_rmia_finds_members_and_ties_count() -> None:
    rng = np.random.default_rng(0)
    base = np.log(expit(rng.normal(size=200)))
    reference = base[None]
    member = np.minimum(base + 0.5, 0)
    population, population_ref = base[100:], base[None, 100:]
    inside = models.rmia(member[:100], reference[:, :100], population, population_ref)
    outside = models.rmia(base[:100], reference[:, :100], population, population_ref)
    assert curves.auc(inside, outside) > 0.7
    # With p(x) = the references' mean (a = 1) every ratio of a non-member is 1: ties, all >= 1.
    level = models.rmia(base[:100], reference[:, :100], population, population_ref, offline_a=1.0)
    assert level.min() == 1.0
    with pytest.raises(InputError, match="reference models"):
        models.rmia(base, np.stack([base, base]), population, population_ref)
    with pytest.raises(InputError, match="same samples"):
        models.rmia(base, reference[:, :50], population, population_ref)
    with pytest.raises(InputError, match="offline_a"):
        models.rmia(base, reference, population, population_ref, offline_a=2)


def test_u_lira_is_its_definition_and_bounds() -> None:
    rng = np.random.default_rng(9)
    u, r = rng.normal(1.0, 1.0, (6, 8)), rng.normal(0.0, 0.5, (5, 8))
    ratios = np.zeros((11, 8))
    for k in range(6):
        for i in range(8):
            own = [u[j, i] for j in range(6) if j != k]
            ratios[k, i] = norm.logpdf(u[k, i], np.mean(own), np.std(own)) - norm.logpdf(
                u[k, i], np.mean(r[:, i]), np.std(r[:, i])
            )
    for k in range(5):
        for i in range(8):
            own = [r[j, i] for j in range(5) if j != k]
            ratios[6 + k, i] = norm.logpdf(
                r[k, i], np.mean(u[:, i]), np.std(u[:, i])
            ) - norm.logpdf(r[k, i], np.mean(own), np.std(own))
    want = ((ratios[:6] > 0).mean(0) + (ratios[6:] <= 0).mean(0)) / 2
    got = models.u_lira(u, r)
    np.testing.assert_allclose(got.per_sample, want)
    assert got.accuracy == pytest.approx(want.mean())
    truth = np.repeat([1, 0], [48, 40])
    assert got.auc == pytest.approx(
        roc_auc_score(truth, np.r_[ratios[:6].ravel(), ratios[6:].ravel()])
    )
    assert models.u_lira(u + 50, r).accuracy == 1.0
    assert models.u_lira(np.ones((3, 4)), np.ones((3, 4))).accuracy == 0.5
    with pytest.raises(NotMeasurable):
        models.u_lira(u[:2], r)


def klom_by_hand(p: np.ndarray, q: np.ndarray) -> float:
    """The released evaluation's definition: digitised bins, scipy's normalised divergence."""
    p, q = np.clip(p, -100, 100), np.clip(q, -100, 100)
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(low, high if low < high else low + 1, 21)
    in_bin = lambda v: np.minimum(np.digitize(v, edges), 20)  # noqa: E731
    share = [np.array([(in_bin(v) == i).sum() for i in range(1, 21)], float) for v in (p, q)]
    share = [s / s.sum() for s in share]
    floored = np.where(share[0] > 0, np.maximum(share[1], 1e-5), share[1])
    return float(scipy_entropy(share[0], floored))


def test_klom_is_its_definition() -> None:
    rng = np.random.default_rng(11)
    u, o = rng.normal(1, 2, (100, 12)), rng.normal(0, 3, (90, 12))
    u[:, 0], o[:, 0] = 4.0, 4.0  # constant and equal
    u[0, 1] = 1e6  # clipped
    got = models.klom(u, o)
    want = [klom_by_hand(u[:, i], o[:, i]) for i in range(12)]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert got[0] == pytest.approx(0, abs=1e-12)
    apart = models.klom(np.zeros((50, 1)), np.ones((50, 1)))
    assert apart[0] == pytest.approx(np.log((1 + 1e-5) / 1e-5))


def challenge_by_hand(u: np.ndarray, r: np.ndarray) -> float:
    """One sample's epsilon, every threshold in a Python loop."""
    pos, neg = (r, u) if np.median(r) > np.median(u) else (u, r)
    spans = np.ptp(pos), np.ptp(neg)
    if min(spans) / max(spans) < 0.01:
        return 50.0
    rates = []
    for t in np.linspace(
        min(u.min(), r.min()),
        max(u.max(), r.max()),
        int(np.ceil(100 * (max(u.max(), r.max()) - min(u.min(), r.min())))),
    ):
        rates.append(((neg >= t).mean(), (pos < t).mean()))
    narrow, wide = (neg, pos) if spans[0] >= spans[1] else (pos, neg)
    width = np.ptp(narrow)
    start, stop = narrow.min() + width - 2.0, narrow.max() + 2.0
    for right in np.linspace(start, stop, int(np.ceil((stop - start) * 100))):
        for left in np.linspace(right - width - 2.0, right - width + 2.0, 400):
            inside = lambda v: ((left <= v) & (v <= right)).mean()  # noqa: B023, E731
            rates.append((inside(wide), 1 - inside(narrow)))
    best = 0.0
    for fpr, fnr in rates:
        if fpr == 0 and fnr == 0:
            return 50.0
        if fpr == 0 or fnr == 0:
            continue
        for a, b in ((fpr, fnr), (fnr, fpr)):
            if 1 - 1e-5 - a > 0:
                best = max(best, np.log(1 - 1e-5 - a) - np.log(b))
    return min(best, 50.0)


def test_challenge_epsilon_is_its_definition() -> None:
    rng = np.random.default_rng(13)
    u, r = rng.normal(0.3, 0.5, 12), rng.normal(0, 0.4, 12)
    assert challenge.epsilon(u, r) == pytest.approx(challenge_by_hand(u, r), rel=1e-6)
    assert challenge.epsilon(u, r) > 0


def test_challenge_extremes() -> None:
    rng = np.random.default_rng(14)
    r = rng.normal(0, 1, (64, 5))
    assert challenge.epsilon(r[:, 0] + 20, r[:, 0]) == 50.0
    assert challenge.epsilon(np.full(64, 0.1), r[:, 0]) == 50.0  # peaked
    assert challenge.epsilon(np.ones(5), np.ones(5)) == 0.0
    assert challenge.epsilon(np.ones(5), np.full(5, 3.0)) == 50.0
    assert challenge.forgetting_quality(r + 20, r) == 0.0
    assert challenge.forgetting_quality(np.ones((5, 3)), np.ones((5, 3))) == 1.0
    same = challenge.forgetting_quality(rng.normal(0, 1, (64, 5)), r)
    assert 0 < same < 1
    by_bucket = [0.5 ** np.floor(challenge.epsilon(r[:, i] * 1.3, r[:, i]) / 0.5) for i in range(5)]
    assert challenge.forgetting_quality(r * 1.3, r) == pytest.approx(np.mean(by_bucket))


def test_challenge_score_multiplies_the_ratios() -> None:
    assert challenge.challenge_score(0.5, (0.9, 1.0), (0.8, 0.5)) == pytest.approx(0.5 * 0.9 * 1.6)
    with pytest.raises(NotMeasurable):
        challenge.challenge_score(0.5, (0.9, 0.0), (0.8, 0.5))


def logits_of(probability: torch.Tensor, labels: torch.Tensor, classes: int = 4) -> torch.Tensor:
    """Logits under which the true class has this probability, the others what is left, evenly."""
    rest = ((1 - probability) / (classes - 1)).log()
    return rest[:, None].repeat(1, classes).scatter(1, labels[:, None], probability.log()[:, None])


def whole_class(member: float, held_out: float, seed: int) -> Subject:
    """Outputs of a model on a forgotten class, 1: what it says of members and of held-out images.

    Every other class has probability 0.9 on both sides; all are jittered by a factor near 1.
    """
    draw, sets = torch.Generator().manual_seed(seed), {}
    for key, n, level in (("train", 200, member), ("test", 120, held_out)):
        labels = torch.arange(n) % 4
        jitter = 0.95 + 0.1 * torch.rand(n, generator=draw).double()
        p = torch.where(labels == 1, torch.full((n,), level, dtype=torch.float64), 0.9) * jitter
        none = torch.zeros(n, 1)
        sets[key] = Outputs(none, logits_of(p, labels), labels, labels == 1, torch.arange(n))
    return Subject(Passes(str(seed), sets))


def test_rmia_sees_the_members_of_a_whole_class() -> None:
    """A population of other classes does not do: all lie on one side, and it gives 0.5."""
    retrained = tuple(whole_class(1e-6, 1e-6, seed) for seed in (1, 2))
    peers = Peers(retrained=retrained, forgotten=(1,), names=tuple("abcd"))
    leaks, forgets = whole_class(1e-3, 1e-6, 3), whole_class(1e-6, 1e-6, 4)
    assert curves.mia_auc(Case(leaks, peers)) == 1
    # Its score is a rank among 15 images: a held-out one above all of them ties with the members.
    assert models.rmia_auc(Case(leaks, peers)) > 0.85
    assert 0.3 < models.rmia_auc(Case(forgets, peers)) < 0.7
    few = whole_class(1e-3, 1e-6, 5)
    test = few.passes.outputs["test"]
    one = torch.cat([(test.labels != 1).nonzero()[:, 0], (test.labels == 1).nonzero()[:1, 0]])
    few.passes.outputs["test"] = test.where(one.sort().values)
    with pytest.raises(NotMeasurable, match="1 held-out images.* at least 2"):
        models.rmia_auc(Case(few, peers))


def test_the_population_of_rmia_is_of_the_classes_that_it_asks_about() -> None:
    """Also where the classes of the set alternate: every second image is then of one class."""
    labels = torch.arange(40) % 4
    none, forget = torch.zeros(40, 1), (labels == 1) | (labels == 3)
    side = Outputs(none, torch.zeros(40, 4), labels, forget, torch.arange(40))
    model = Subject(Passes("turns", {"train": side, "test": side}))
    sides = attack_sides(Case(model, Peers(forgotten=(1, 3), names=tuple("abcd"))))
    asked = sides.held_out & ~sides.population
    assert labels[asked].bincount().tolist() == labels[sides.population].bincount().tolist()
    assert labels[asked].bincount().tolist() == [0, 5, 0, 5]


def test_the_challenge_asks_images_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the classes alternate, every second image would be of one class."""
    columns = torch.arange(400).double().expand(3, 400)
    several = SeveralRuns(Runs(list(columns), {}), Runs(list(columns), {}))
    monkeypatch.setattr(challenge, "forgetting_quality", lambda u, r: (u % 2).mean())
    assert 0.3 < challenge.challenge_quality(several) < 0.7


def test_svc_efficacy_has_the_published_form_beside_that_on_all_test_images() -> None:
    draw = torch.Generator().manual_seed(0)
    model = whole_class(1e-2, 1e-2, 6)
    for side in model.passes.outputs.values():
        side.logits.add_(2 * torch.randn(side.logits.shape, generator=draw))
    train, test = model.passes.outputs["train"], model.passes.outputs["test"]
    case = Case(model, Peers(forgotten=(1,), names=tuple("abcd")))
    got = attacks.svc_probabilities(case)
    kept = test.labels != 1
    for form, rows in (("", kept | True), ("_published", kept)):
        of = (train.logits[~train.forget], test.logits[rows], train.logits[train.forget])
        sides = [signals.probabilities(each) for each in of]
        assert got[form] == attacks.svc_efficacy(*sides)
    assert got[""] != got["_published"]
    single = Case(model, Peers(names=tuple("abcd")))  # single samples: the forms are one
    both = attacks.svc_probabilities(single)
    assert both[""] == both["_published"] == got[""]
