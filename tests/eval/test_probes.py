"""Probes, information, relearning and weight distance against scikit-learn, numbers by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from letheon.engine.models.classifier import Classifier, build
from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.metrics.weights import weight_distance
from letheon.eval.probes import information, linear, relearn
from letheon.eval.probes.critic import build_critic, critic_information


def blobs(n: int, classes: int, width: int, apart: float, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart
    labels = rng.integers(0, classes, n)
    return centres[labels] + rng.normal(size=(n, width)), labels


@pytest.mark.parametrize("solver", ["logistic", "ridge"])
def test_linear_probe_is_scikit_learns_on_scaled_features(solver: str) -> None:
    train, y = blobs(300, 4, 6, 0.7, 0)
    test, asked = blobs(200, 4, 6, 0.7, 1)
    scale = StandardScaler().fit(train)
    model = (
        LogisticRegression(C=1.0, max_iter=2000)
        if solver == "logistic"
        else RidgeClassifier(alpha=1.0)
    ).fit(scale.transform(train), y)
    right = model.predict(scale.transform(test)) == asked
    got = linear.linear_probe(train, y, test, asked, np.array([1, 3]), solver=solver)
    gone = np.isin(asked, [1, 3])
    assert got.forgotten == right[gone].mean()
    assert got.retained == right[~gone].mean()
    assert got.per_class == {c: right[asked == c].mean() for c in range(4)}
    assert 0.3 < got.forgotten < 1


def test_probe_recovers_a_class_the_head_forgot_and_not_one_the_features_lost() -> None:
    train, y = blobs(400, 3, 5, 3.0, 0)
    test, asked = blobs(200, 3, 5, 3.0, 1)
    kept = linear.linear_probe(train, y, test, asked, np.array([2]))
    assert kept.forgotten > 0.95
    lost_train, lost_test = train.copy(), test.copy()
    lost_train[y == 2] = train[y != 2][: (y == 2).sum()]
    lost_test[asked == 2] = test[asked != 2][: (asked == 2).sum()]
    lost = linear.linear_probe(lost_train, y, lost_test, asked, np.array([2]))
    assert lost.forgotten < 0.6


def test_probe_takes_constant_features_and_one_sample_classes() -> None:
    train, y = blobs(60, 2, 3, 3.0, 0)
    test, asked = blobs(40, 2, 3, 3.0, 1)
    train[:, 1] = test[:, 1] = 5.0
    train, y = np.r_[train, [[9.0, 5.0, 9.0]]], np.r_[y, 7]
    got = linear.linear_probe(train, y, test, asked, np.array([0]))
    assert got.forgotten > 0.9
    flat = linear.linear_probe(np.ones((6, 2)), y[:6], np.ones((4, 2)), asked[:4], np.array([0, 1]))
    assert 0 <= flat.forgotten <= 1
    assert flat.retained is None


def test_probe_errors() -> None:
    train, y = blobs(20, 2, 3, 1.0, 0)
    with pytest.raises(RunFailed, match="NaN"):
        linear.linear_probe(train * np.nan, y, train, y, np.array([0]))
    with pytest.raises(NotMeasurable, match="forgotten"):
        linear.linear_probe(train, y, train, y, np.array([5]))
    with pytest.raises(InputError, match="widths"):
        linear.linear_probe(train, y, train[:, :2], y, np.array([0]))


def test_few_shot_takes_so_many_of_each_class() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    chosen = linear.few_shot(labels, 5)
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 5]
    assert (np.diff(chosen) > 0).all()
    assert (chosen == linear.few_shot(labels, 5)).all()
    train, y = blobs(200, 3, 4, 2.0, 0)
    got = linear.linear_probe(train, y, train, y, np.array([0]), shots=4)
    few = linear.few_shot(y, 4)
    want = linear.linear_probe(train[few], y[few], train, y, np.array([0]))
    assert got == want


def test_weight_distance_by_hand() -> None:
    a = {"w": torch.tensor([3.0, 0.0]), "n": torch.tensor(3), "z": torch.zeros(2)}
    b = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(5), "z": torch.zeros(2)}
    assert weight_distance(a, b) == {"w": 5.0, "z": 0.0}
    with pytest.raises(NotMeasurable, match="extra"):
        weight_distance(a | {"extra": torch.ones(1)}, b)
    with pytest.raises(NotMeasurable, match="differ in w"):
        weight_distance(a | {"w": torch.ones(3)}, b)


def test_info_nce_is_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(40, 2)), rng.integers(0, 2, 40)
    want = 0.0
    for k in range(40):
        others = [np.exp(scores[k, y[j]]) for j in range(40)]
        want += (scores[k, y[k]] - np.log(np.mean(others))) / 40
    got = information.info_nce(torch.from_numpy(scores), torch.from_numpy(y))
    assert got == pytest.approx(want, abs=1e-12)


def gaussian_information(apart: float, share: float) -> float:
    """I(Z; Y) in nats for two unit Gaussians `apart`, the second with this share, by quadrature."""

    def integrand(z: float) -> float:
        p, q = (1 - share) * norm.pdf(z), share * norm.pdf(z, apart)
        terms = p * np.log(p / (1 - share) / (p + q)) + q * np.log(q / share / (p + q))
        return float(terms)

    return float(quad(integrand, -9, 9 + apart)[0])


@pytest.mark.parametrize(("apart", "share"), [(0.0, 0.5), (1.0, 0.5), (2.5, 0.5), (2.5, 0.1)])
def test_information_estimates_the_true_value(apart: float, share: float) -> None:
    rng = np.random.default_rng(5)
    member = torch.arange(8000) % round(1 / share) == 0
    z = rng.normal(size=(8000, 1)) + apart * member.numpy()[:, None]
    got = information.information(np.c_[z, np.ones(8000)], member)
    assert got == pytest.approx(gaussian_information(apart, share), abs=0.02)


def test_information_of_noise_in_many_dimensions_is_none() -> None:
    rng = np.random.default_rng(6)
    member = torch.arange(200) % 2 == 0
    noise = rng.normal(size=(200, 150))
    assert information.information(noise, member) < 0.05  # on its own samples: log 2


def test_idi_by_hand() -> None:
    original, retrained = {"a": 0.6, "b": 0.5}, {"a": 0.1, "b": 0.2}
    got = information.idi({"a": 0.35, "b": 0.1}, retrained, original)
    assert got.value == pytest.approx((0.25 - 0.1) / 0.8)
    assert information.idi(original, retrained, original).value == 1
    assert information.idi(retrained, retrained, original).value == 0
    with pytest.raises(NotMeasurable, match="layers"):
        information.idi({"a": 1.0}, retrained, original)
    with pytest.raises(NotMeasurable, match="more than 0"):
        information.idi(original, original, original)
    with pytest.raises(RunFailed, match="NaN"):
        information.information(np.full((4, 1), np.nan), torch.tensor([0, 0, 1, 1]) > 0)


def accuracy_on(features: torch.Tensor, labels: torch.Tensor):
    return lambda net: float((net(features).argmax(1) == labels).double().mean())


def test_relearn_is_plain_sgd_on_a_copy() -> None:
    x, y = (torch.from_numpy(v) for v in blobs(64, 3, 4, 2.0, 0))
    head = relearn.head_on_features(torch.zeros(3, 4).double(), None).double()
    before = copy.deepcopy(head.state_dict())
    batches = relearn.feature_batches(x, y, 20, seed=1)
    got = relearn.relearn(head, batches, accuracy_on(x, y), steps=5, every=2, lr=0.1)
    assert torch.equal(before["weight"], head.weight)
    weight, velocity = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    accuracies = []
    for step in range(6):
        accuracies.append(float(((x @ weight.T).argmax(1) == y).double().mean()))
        rows, names = batches(step)
        grad = (torch.softmax(rows @ weight.T, 1) - torch.eye(3)[names]).T @ rows / len(rows)
        velocity = 0.9 * velocity + grad
        weight = weight - 0.1 * velocity
    assert got.steps == [0, 2, 4, 5]
    assert got.accuracy == pytest.approx([accuracies[s] for s in got.steps])
    assert got.reached is None


def test_relearn_stops_at_its_target_and_index() -> None:
    x, y = (
        torch.from_numpy(v).float() if i == 0 else torch.from_numpy(v)
        for i, v in enumerate(blobs(64, 2, 4, 3.0, 0))
    )
    batches = relearn.feature_batches(x, y, 64, seed=1)
    blank = nn.Linear(4, 2)
    nn.init.zeros_(blank.weight), nn.init.zeros_(blank.bias)
    with torch.no_grad():
        blank.bias[0] = 3.0
    measure = accuracy_on(x[y == 1], y[y == 1])
    slow = relearn.relearn(blank, batches, measure, every=1, target=0.9)
    assert slow.accuracy[0] == 0
    assert slow.reached == slow.steps[-1] > 1
    assert slow.accuracy[-1] >= 0.9 > slow.accuracy[-2]
    with torch.no_grad():
        blank.bias[0] = 0.3
    quick = relearn.relearn(blank, batches, measure, every=1, target=0.9)
    assert quick.reached is not None and quick.reached < slow.reached
    there = relearn.relearn(blank, batches, lambda net: 1.0, target=0.9)
    assert there == ([0], [1.0], 0)


def test_relearn_reads_named_outputs_and_leaves_batch_norm_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
            self.head = nn.Linear(5, 2)

        def forward(self, x: torch.Tensor):
            from collections import namedtuple

            features = self.body(x)
            return namedtuple("Output", "logits features")(self.head(features), features)

    net = Net().train()
    seen = []
    x, y = torch.randn(8, 4), torch.tensor([0, 1] * 4)
    relearn.relearn(
        net,
        lambda step: (x, y),
        lambda learner: seen.append(copy.deepcopy(learner.state_dict())) or 0.0,
        steps=2,
    )
    assert torch.equal(seen[0]["body.1.running_mean"], seen[-1]["body.1.running_mean"])
    assert not torch.equal(seen[0]["head.weight"], seen[-1]["head.weight"])
    assert net.training


def test_feature_batches_give_each_row_once_an_epoch() -> None:
    x, y = torch.arange(7.0)[:, None], torch.arange(7)
    batch = relearn.feature_batches(x, y, 3, seed=0)
    epochs = [torch.cat([batch(e * 3 + s)[1] for s in range(3)]) for e in range(2)]
    assert all(sorted(e.tolist()) == list(range(7)) for e in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(batch(0)[1], batch(0)[1])
    with pytest.raises(InputError):
        relearn.feature_batches(x, y[:2], 3, seed=0)


def test_relearn_that_diverges_names_the_step() -> None:
    x, y = torch.full((4, 1), 1e30), torch.tensor([0, 1, 0, 1])
    with pytest.raises(RunFailed, match="step 5"):
        relearn.relearn(nn.Linear(1, 2), lambda s: (x, y), lambda n: 0.0, lr=1e30)


@pytest.mark.slow
def test_a_build_critic_later_layers_reads_what_its_layer_holds() -> None:
    """Bright images are members: told by every layer, unless an earlier one destroyed it."""
    generator = torch.Generator().manual_seed(0)
    member = torch.arange(200) % 2 == 0
    images = torch.randn(200, 3, 16, 16, generator=generator) + 2.0 * member[:, None, None, None]
    model = build("small", 4, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    device = torch.device("cpu")

    def told(of: Classifier, tap: str) -> float:
        return critic_information(of, tap, images, member, device, steps=60)

    assert told(model, "net.conv1") > 0.6 and told(model, "features") > 0.4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shuffled = member[torch.randperm(200, generator=generator)]
    noise = torch.randn(200, 3, 16, 16, generator=generator)
    assert critic_information(model, "net.conv1", noise, shuffled, device, steps=60) < 0.1
    # The head plays no part, so head distillation has the original's values.
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.head.weight)
    assert told(other, "net.conv2") == told(model, "net.conv2")
    # What a frozen layer has thrown away stays away.
    with torch.no_grad():
        other.net.get_parameter("conv2.weight").zero_()
    assert told(other, "net.conv2") < 1e-6


def test_only_what_follows_a_layer_is_trained() -> None:
    net, learned = build_critic(build("small", 4, 1), "net.conv2", 0)
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert len(names) == len(learned) and net.head.out_features == 2
    assert all(name.startswith(("net.conv3", "net.conv4", "net.bn", "net.fc")) for name in names)
    assert {"net.conv3.weight", "net.conv4.weight"} < names
    assert not names & {"net.conv1.weight", "net.conv2.weight", "net.bn1.weight"}
