"""Methods that train on the retain set, and the controls, against plain references."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.method import Method
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.models.initial import fresh_seed, initial_copy
from letheon.errors import InputError
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Batch, Stream
from letheon.methods.bad_teacher import BadTeacher
from letheon.methods.boundary_shrink import BoundaryShrink
from letheon.methods.cf_k import CfK
from letheon.methods.cola import Cola
from letheon.methods.contrastive import Contrastive
from letheon.methods.eu_k import EuK
from letheon.methods.kd import Kd
from letheon.methods.lotus import Lotus
from letheon.methods.neg_grad_plus import NegGradPlus
from letheon.methods.no_op import NoOp
from letheon.methods.one_point import OnePoint
from letheon.methods.random_network import RandomNetwork
from letheon.methods.retrain import Retrain
from letheon.methods.rkd import Rkd
from letheon.methods.salun import SalUn
from letheon.methods.salun_soft import SalUnSoft
from letheon.methods.scrub import Scrub
from letheon.methods.unsir import Unsir
from letheon.methods.weight_distance import WeightDistance
from letheon.methods.weight_distortion import WeightDistortion, normal
from letheon.methods.weight_negation import WeightNegation
from tests.methods.plain import (
    RECIPE,
    assert_same,
    ce,
    descend,
    original,
    train_in_doubles,
)  # fmt: skip
from tests.world import PRESET, run_of, trained


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (CfK(RECIPE, k=1), ["5.weight", "5.bias"]),
        (CfK(RECIPE, layers=("0", "5.bias")), ["0.weight", "0.bias", "5.bias"]),
        (EuK(RECIPE, k=1), ["5.weight", "5.bias"]),
    ],
)
def test_last_layers(method: CfK, names: list[str]) -> None:
    run, reads = train_in_doubles(method)
    net = original()
    if isinstance(method, EuK):
        net.net[5].load_state_dict(initial_copy(original(), fresh_seed(0)).net[5].state_dict())  # type: ignore[index]
    moving = [net.net.get_parameter(name) for name in names]
    assert_same(run, descend(run, lambda epoch: [("retain", ce)], net, moving))
    assert reads == [(0, 31)] and all(p.requires_grad for p in run.model.parameters())


def test_frozen_layers_keep_their_statistics() -> None:
    """Batch-norm in the part that trains moves its statistics, elsewhere it does not."""
    for k, moves in ((1, False), (2, True)):
        run, _ = trained(CfK(replace(RECIPE, batch_norm="local"), k=k))
        same = torch.equal(run.model.net[1].running_mean, original().net[1].running_mean.float())  # type: ignore[index]
        assert same != moves


def test_eu_k_draws_everything_anew_where_k_is_all() -> None:
    run = run_of(EuK(RECIPE, k=2))
    EuK(RECIPE, k=2).prepare(run)
    assert weights_digest(run.model) == weights_digest(initial_copy(run.model, fresh_seed(0)))
    assert weights_digest(run.model) != weights_digest(run_of(EuK(RECIPE)).model)


def test_weight_negation() -> None:
    run, reads = train_in_doubles(WeightNegation(RECIPE))
    net = original()
    with torch.no_grad():
        net.net[0].weight.neg_()  # type: ignore[index, operator, union-attr]
    assert_same(run, descend(run, lambda epoch: [("retain", ce)], net))
    assert reads == [(0, 31)]


@pytest.mark.parametrize("disturb", ["noise", "attenuate", "drop"])
def test_weight_distortion(disturb: str) -> None:
    run, reads = train_in_doubles(WeightDistortion(RECIPE, disturb=disturb, amount=0.3))  # type: ignore[arg-type]
    net = original()
    with torch.no_grad():
        for name, weight in net.net.named_parameters():
            u = uniform(0, f"disturb {name}", 0, torch.arange(weight.numel()), 2)
            draws = (-2 * torch.log1p(-u[:, 0])).sqrt() * (2 * math.pi * u[:, 1]).cos()
            change = {
                "noise": weight + 0.3 * draws.view(weight.shape),
                "attenuate": 0.3 * weight,
                "drop": weight * (u[:, 0] >= 0.3).view(weight.shape),
            }
            weight.copy_(change[disturb])
    assert_same(run, descend(run, lambda epoch: [("retain", ce)], net))
    assert reads == [(0, 31)]


def test_normal_numbers_are_normal() -> None:
    draws = normal(3, "test", 20_000, torch.device("cpu"))
    assert abs(float(draws.mean())) < 0.03 and abs(float(draws.std()) - 1) < 0.03
    assert abs(float((draws.abs() < 1).double().mean()) - 0.6827) < 0.015
    assert normal(3, "test", 0, torch.device("cpu")).shape == (0,)


def test_weight_distance() -> None:
    start = torch.nn.utils.parameters_to_vector(original().parameters()).detach()

    def loss(net: Classifier, batch: Batch) -> Tensor:
        away = torch.nn.utils.parameters_to_vector(net.parameters()) - start
        return ce(net, batch) - 0.4 * (away.square().mean() + 1e-8).sqrt()

    run, reads = train_in_doubles(WeightDistance(RECIPE, alpha=0.4))
    assert_same(run, descend(run, lambda epoch: [("retain", loss)]))
    assert reads == [(0, 31)]


def contrast(net: Classifier, batch: Batch) -> Tensor:
    """Khosla et al. 2020, eq. 2, sample by sample."""
    z, rows = F.normalize(net(batch.images).features, dim=1), []
    for i, label in enumerate(batch.labels):
        others = [j for j in range(len(z)) if j != i]
        scores = torch.stack([z[i] @ z[j] / 0.2 for j in others])
        positive = [n for n, j in enumerate(others) if batch.labels[j] == label]
        if positive:
            rows.append((scores.logsumexp(0) - scores[positive]).mean())
    return torch.stack(rows).mean()


def test_cola() -> None:
    """The head rests while features collapse; then a new optimizer trains everything."""
    run, reads = train_in_doubles(Cola(replace(RECIPE, epochs=2), 1, temperature=0.2))
    net = original()
    body = [p for name, p in net.named_parameters() if not name.startswith("net.5")]
    run.recipe = RECIPE
    first = run.loader
    net = descend(run, lambda epoch: [("retain", contrast)], net, body)

    class Second:
        def train(self, stream: Stream, epoch: int) -> object:
            return first.train(stream, 1)

    run.loader = Second()  # type: ignore[assignment]
    assert_same(run, descend(run, lambda epoch: [("retain", ce)], net))
    assert reads == [(0, 31)] * 2


def test_unsir() -> None:
    method = Unsir(replace(RECIPE, batch_size=6), repair_lr=0.02, retain_share=0.6, noise_steps=3,
                   noise_images=8, noise_weight=0.7)  # fmt: skip
    run, reads = train_in_doubles(method)
    noise = normal(0, "unsir", 8 * 3 * 64, torch.device("cpu")).view(8, 3, 8, 8)
    noise, label = noise.requires_grad_(True), torch.tensor([2] * 8)  # learned by 6 and 2
    adam, teacher = torch.optim.Adam([noise], 0.1), original()
    for _ in range(3):
        adam.zero_grad()
        fit = F.cross_entropy(teacher(noise).logits, label)
        (0.1 * noise.square().sum((1, 2, 3)).mean() - fit).backward()
        adam.step()
    images = noise.detach()

    def impair(net: Classifier, batch: Batch) -> Tensor:
        pick = (uniform(0, "unsir-noise", 0, batch.index, 1)[:, 0] * 8).long()
        bad = F.cross_entropy(net(images[pick]).logits, label.new_full((len(pick),), 2))
        return ce(net, batch) + 0.7 * bad

    part = Stream("retain", share=0.6)
    net = descend(run, lambda epoch: [(part, impair)])
    run.recipe = replace(run.recipe, lr=0.02)
    assert_same(run, descend(run, lambda epoch: [(part, ce)], net))
    assert reads == [(0, 24)] * 2  # four of six batches
    run.forget_classes = ()
    with pytest.raises(InputError, match="whole classes"):
        method.check(run)


def test_controls(tmp_path: Path) -> None:
    run, reads = train_in_doubles(NoOp())
    assert_same(run, original())
    assert reads == [] and NoOp.kind == RandomNetwork.kind == OnePoint.kind == "control"
    assert RandomNetwork.from_scratch and not NoOp.from_scratch
    for method in (RandomNetwork(), SalUn(Retrain())):  # not the original's own start
        assert method.stream_seed(1) == fresh_seed(1) not in (1, fresh_seed(2))


def test_an_untrained_copy_is_the_builders_own() -> None:
    model = build("small", 3, seed=5)
    assert weights_digest(initial_copy(model, 7)) == weights_digest(build("small", 3, seed=7))
    own = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "own", PRESET)
    state = torch.random.get_rng_state()
    first, again = initial_copy(own, 1), initial_copy(own, 1)
    assert weights_digest(first) == weights_digest(again) != weights_digest(own)
    assert weights_digest(initial_copy(own, 2)) != weights_digest(first)
    assert torch.equal(torch.random.get_rng_state(), state)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    odd = Classifier(nn.Sequential(nn.Flatten(), Scale(), nn.Linear(12, 2)), "own", PRESET)
    with pytest.raises(InputError, match="got 1 of kind Scale"):
        initial_copy(odd, 1)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (NegGradPlus, {"alpha": 1.1}),
        (OnePoint, {"weight": -1.0}),
        (Contrastive, {"temperature": 0.0}),
        (BoundaryShrink, {"epsilon": float("nan")}),
        (SalUnSoft, {"density": 2.0}),
        (Scrub, {"max_epochs": -1}),
        (Scrub, {"forget_batch_size": 0}),
        (Kd, {"temperature": 0.0}),
        (Kd, {"kd_weight": -1.0}),
        (BadTeacher, {"retain_share": 0.0}),
        (Lotus, {"retain_share": 1.1}),
        (Lotus, {"alpha": float("inf")}),
        (Cola, {"collapse_epochs": 11}),
        (Unsir, {"noise_images": 0}),
        (WeightDistance, {"alpha": -1.0}),
        (WeightDistortion, {"disturb": "drop", "amount": 1.5}),
    ],
)
def test_values_out_of_range_are_refused(kind: type[Method], wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"got .* expected") as error:
        kind(**wrong)
    assert error.value.option in wrong


def test_layers_and_micro_batches_that_do_not_fit_are_refused() -> None:
    pieces, text = replace(RECIPE, grad_accum_steps=2), "got 2 micro-batches"
    wrong: list[tuple[Method, str]] = [
        (CfK(k=3), "expected 1 to 2"),
        (EuK(layers=("layer4",)), "got layer 'layer4'"),
        (WeightNegation(layers=("0", "9")), "got layer '9'"),
        *((kind(pieces), text) for kind in (Rkd, Cola, Contrastive)),
    ]
    for method, text in wrong:
        with pytest.raises(InputError, match=text):
            method.check(run_of(method))
    with pytest.raises(InputError, match="got k 0; expected 1 or more"):  # before any model
        CfK(k=0)


def test_no_retain_sample_is_refused_in_one_line() -> None:
    for method in (CfK(RECIPE), NegGradPlus(RECIPE), Scrub(RECIPE)):
        run = run_of(method)
        run.forget[:] = True
        run.loader.forget = run.forget.numpy()  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="got 41 forget and 0 retain samples"):
            for phase in method.phases(run, method.prepare(run), 0):
                run.loader.steps(phase.stream)
