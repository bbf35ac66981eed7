"""The attack suite: each attack beside its definition, and on networks whose truth is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.nn import functional as F

from letheon.engine.models.classifier import Classifier, build
from letheon.errors import NotMeasurable
from letheon.eval.attacks.inputs import RADIUS, divergence, prompt, push
from letheon.eval.attacks.session import attack_rows
from letheon.eval.attacks.suite import IMAGES, Targets, attack
from letheon.eval.attacks.weights import PLACES, barrier, interpolate, quantize
from letheon.eval.case import Case, Peers, Subject
from letheon.eval.inference.passes import Passes
from letheon.eval.inference.sampling import stratified_halves
from letheon.eval.outputs import Outputs
from letheon.eval.probes.prototypes import attack_class_means, attack_prototype
from letheon.eval.probes.relearn import RATES, feature_batches, find_rate
from letheon.eval.row_builder import Row, add_stage
from letheon.loaders.preset import Preset
from tests.eval.sweeping import still

CPU = torch.device("cpu")
PRESET = Preset(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, resize="none", resize_to=8)


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, torch.Tensor, torch.Tensor]:
    """A network that knows four classes of colored noise, and the images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 4
    images = 0.5 * torch.randn(128, 3, 8, 8, generator=generator)
    images[torch.arange(128), labels % 3] += (labels < 3).float()[:, None, None]
    model = build("small", 4, 1).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images).logits, labels).backward()
        optimizer.step()
    assert share(model, images, labels) > 0.95
    return model, images, labels


def share(model: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(images).logits.argmax(1) == labels).double().mean())


def hide(model: Classifier) -> Classifier:
    """A model that never names class 1: its head alone was changed."""
    hidden = copy.deepcopy(model)
    with torch.no_grad():
        hidden.head.bias[1] -= 20
    return hidden


def test_quantized_weights_are_multiples_of_a_channels_step() -> None:
    model = build("small", 4, 1)
    coarse = dict(quantize(model).named_parameters())
    for name, weight in model.named_parameters():
        got = coarse[name].detach().numpy()
        if weight.dim() < 2:
            assert np.array_equal(got, weight.detach().numpy())
            continue
        rows = weight.detach().flatten(1).numpy()
        step = np.abs(rows).max(axis=1, keepdims=True) / 7
        np.testing.assert_allclose(got.reshape(rows.shape), np.rint(rows / step) * step, atol=1e-6)
        assert np.abs(got.reshape(rows.shape) - rows).max() <= step.max() / 2 + 1e-6


def test_the_path_has_its_ends_and_no_barrier_to_itself(
    trained: tuple[Classifier, torch.Tensor, torch.Tensor],
) -> None:
    model, images, labels = trained
    other = build("small", 4, 2).eval()
    half = dict(interpolate(model, other, 0.5).named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(half[name], (weight + other.get_parameter(name)) / 2)
    assert barrier(model, model, images, labels, CPU, still) == pytest.approx(0, abs=1e-6)
    with pytest.raises(NotMeasurable, match="another architecture"):
        interpolate(model, build("small", 5, 1), 0.5)


def test_neighbors_lie_within_the_radius_and_raise_the_loss(
    trained: tuple[Classifier, torch.Tensor, torch.Tensor],
) -> None:
    model, images, labels = trained
    near = push(model, images, labels, CPU)
    radius = RADIUS / torch.tensor(model.preset.std).view(1, 3, 1, 1)
    assert bool(((near - images).abs() <= radius + 1e-5).all())
    with torch.no_grad():
        before, after = (F.cross_entropy(model(x).logits, labels) for x in (images, near))
    assert after > before


def test_divergence_is_that_of_the_kept_classes() -> None:
    draw = np.random.default_rng(0).normal(size=(2, 6, 4))
    kept = np.exp(draw[:, :, [0, 2, 3]])
    p, q = kept / kept.sum(axis=2, keepdims=True)
    want = np.mean(jensenshannon(p, q, axis=1) ** 2)
    first, second = torch.from_numpy(draw)
    assert divergence(first, second, (1,)) == pytest.approx(want)
    second = first.clone()
    second[:, 1] -= 20  # hiding the forgotten class is no damage
    assert divergence(first, second, (1,)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(NotMeasurable):
        divergence(first, second, (0, 1, 2))


def test_what_was_hidden_comes_back_and_the_model_stays(
    trained: tuple[Classifier, torch.Tensor, torch.Tensor],
) -> None:
    model, images, labels = trained
    member, hidden = labels == 1, hide(model)
    before = {name: value.clone() for name, value in hidden.state_dict().items()}
    assert share(hidden, images[member], labels[member]) == 0
    targets = Targets(images, labels, member, (1,), 30, 0.01)
    row = Row("hidden")
    add_stage(row, attack(hidden, model, targets, CPU, still))
    assert all(torch.equal(value, before[name]) for name, value in hidden.state_dict().items())
    assert row.values["over_unlearning"] == pytest.approx(0, abs=1e-9)
    assert row.values["attack_quantized"] == 0
    learned = prompt(model, images[member], labels[member], 5, CPU)
    assert learned >= share(model, images[member], labels[member]) - 0.05
    lightly, wide = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for one in (lightly.head.weight, lightly.head.bias):
            one *= 0.02  # the same answers, less sure
        logits = lightly(images).logits
        # All are called 2.
        lightly.head.bias[2] += (logits.max(dim=1).values - logits[:, 2]).max() + 0.1
        wide.head.weight *= 1e38  # its loss is no number
    assert share(lightly, images[member], labels[member]) == 0
    back = attack(lightly, model, targets, CPU, still)
    assert back.result("overreach") > 0.1  # the kept classes were damaged
    ends = attack(wide, model, targets, CPU, still)
    with pytest.raises(NotMeasurable, match="not finite"):
        ends.result("retain only")
    assert 0 <= ends.result("quantized") <= 1  # the others are made all the same
    alone = Row("alone")
    add_stage(alone, attack(hidden, None, targets, CPU, still))
    assert alone.values["mode_barrier"] is None and "no original" in alone.why["mode_barrier"]
    assert alone.values["attack_retain_only"] == row.values["attack_retain_only"]


class Gate(nn.Module):
    """One number before every feature: what hides there is hidden from all classes at once."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.value * rows


def gated(gate: float, known: bool) -> Classifier:
    """Name the channel that is lit, of three; class 1 has no weights where it is not known."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Gate(gate), nn.Linear(3, 3))
    with torch.no_grad():
        net[3].weight.copy_(4 * torch.eye(3))
        net[3].bias.zero_()
        if not known:
            net[3].weight[1], net[3].bias[1] = 0, -9
    return Classifier(net, "gated", PRESET)


def test_retain_images_alone_bring_back_what_is_hidden_and_not_what_is_gone() -> None:
    labels = torch.arange(96) % 3
    images = torch.zeros(96, 3, 8, 8)
    images[torch.arange(96), labels] = 1
    member = labels == 1
    targets = Targets(images, labels, member, (1,), 20, 0.01)

    def recalled(model: Classifier) -> float:
        return attack(model, None, targets, CPU, still).result("retain only")

    hidden = gated(-0.05, known=True)
    assert share(hidden, images[member], labels[member]) == 0
    assert recalled(hidden) == 1  # its classes share the gate, which retain images open
    assert recalled(gated(-0.05, known=False)) == 0  # a retrained model's truth
    # The attack is SGD with momentum on the retain images alone, written out.
    rows, names = images[~member].mean((2, 3)), labels[~member]
    gate = torch.tensor(-0.05, requires_grad=True)
    weight, bias = (4 * torch.eye(3)).requires_grad_(True), torch.zeros(3, requires_grad=True)
    batch, pace, best = feature_batches(rows, names, 64, seed=0), [0, 0, 0], 0.0
    for step in range(20):
        x, y = batch(step)
        loss = F.cross_entropy(gate * x @ weight.T + bias, y)
        slopes = torch.autograd.grad(loss, [gate, weight, bias])
        pace = [0.9 * v + g for v, g in zip(pace, slopes, strict=True)]
        with torch.no_grad():
            for value, v in zip((gate, weight, bias), pace, strict=True):
                value -= 0.01 * v
            if step % 5 == 4:
                logits = gate * images[member].mean((2, 3)) @ weight.T + bias
                best = max(best, float((logits.argmax(1) == 1).double().mean()))
    assert best == 1


def test_rows_of_an_ordered_set_are_of_all_its_classes() -> None:
    labels = torch.arange(20).repeat_interleave(400)
    rows = attack_rows((labels == 3) | (labels == 8))
    assert set(labels[rows].tolist()) == set(range(20))
    assert len(rows) == 2 * IMAGES and torch.equal(rows, rows.unique())


def test_the_barrier_is_its_definition(
    trained: tuple[Classifier, torch.Tensor, torch.Tensor],
) -> None:
    model, images, labels = trained
    other = build("small", 4, 9).eval()
    own, far = model.state_dict(), other.state_dict()

    def loss(place: float) -> float:
        mixed = {k: (1 - place) * v + place * far[k] for k, v in own.items() if "num_" not in k}
        between = copy.deepcopy(model)
        between.load_state_dict(mixed, strict=False)
        with torch.no_grad():
            return float(F.cross_entropy(between(images).logits, labels))

    excess = [loss(p) - (1 - p) * loss(0) - p * loss(1) for p in PLACES]
    assert barrier(model, other, images, labels, CPU, still) == pytest.approx(max(excess), abs=1e-5)


def test_a_prompt_recovers_what_a_small_step_hides(
    trained: tuple[Classifier, torch.Tensor, torch.Tensor],
) -> None:
    model, images, labels = trained
    member, hidden = labels == 1, copy.deepcopy(model)
    with torch.no_grad():
        logits = model(images[member]).logits
        rest = logits[:, [0, 2, 3]].max(dim=1).values
        hidden.head.bias[1] -= (logits[:, 1] - rest).max() + 0.1
    assert share(hidden, images[member], labels[member]) == 0
    assert prompt(hidden, images[member], labels[member], 40, CPU) > 0.3


def test_a_prompt_learns_from_the_classes_that_it_is_asked(
    trained: tuple[Classifier, torch.Tensor, torch.Tensor],
) -> None:
    """Where the forget images of two classes alternate, every second image is of one class."""
    model, images, labels = trained
    turns = (labels % 2 == 1).nonzero()[:, 0]
    assert labels[turns].tolist() == [1, 3] * (len(turns) // 2)
    hidden = copy.deepcopy(model)
    with torch.no_grad():
        logits = model(images[turns]).logits
        right = logits.gather(1, labels[turns, None])[:, 0]
        hidden.head.bias[[1, 3]] -= (right - logits[:, [0, 2]].max(dim=1).values).max() + 0.1
    assert share(hidden, images[turns], labels[turns]) == 0
    assert prompt(hidden, images[turns], labels[turns], 20, CPU) > 0.5
    fit, asked = stratified_halves(labels[turns])
    assert torch.equal(torch.cat([fit, asked]).sort().values, torch.arange(len(turns)))
    for half in (fit, asked):
        assert labels[turns][half].bincount().tolist() == [0, 16, 0, 16]
        # nor does it go by what alternates within a class
        assert 0.2 < float((half // 2 % 2).double().mean()) < 0.8
    single = stratified_halves(torch.arange(7))  # one image each: both halves have some
    assert [len(half) for half in single] == [4, 3]


def test_the_rate_is_the_largest_at_which_the_model_does_not_fall_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (64,), generator=generator)
    inputs = torch.randn(64, 5, generator=generator)
    net = nn.Linear(5, 2)
    nn.init.zeros_(net.weight)
    assert find_rate(net, feature_batches(inputs, labels, 64, 0)) == RATES[0]
    # A curvature 10,000 times as large: labels are chance, so that the gradient never vanishes.
    assert find_rate(net, feature_batches(100 * inputs, labels, 64, 0)) < RATES[0]


def test_class_means_are_scikit_learns_nearest_centroids() -> None:
    draw = np.random.default_rng(3)
    centers = draw.normal(size=(3, 5))

    def outputs(n: int) -> Outputs:
        labels = torch.from_numpy(draw.integers(0, 3, n))
        rows = centers[labels] + draw.normal(size=(n, 5))
        features = F.normalize(torch.from_numpy(rows), dim=1).float()  # cosine is then distance
        index = torch.arange(n)
        return Outputs(features, torch.zeros(n, 3), labels, labels == 1, index)

    train, test = outputs(90), outputs(60)
    case = Case(Subject(Passes("a", {"train": train, "test": test})), Peers(forgotten=(1,)))
    fit = NearestCentroid().fit(train.features.numpy(), train.labels.numpy())
    fit.centroids_ /= np.linalg.norm(fit.centroids_, axis=1, keepdims=True)
    asked = test.labels == 1
    want = np.mean(fit.predict(test.features[asked].numpy()) == 1)
    assert attack_class_means(case) == pytest.approx(want)
    assert abs(attack_prototype(case) - want) < 0.4
