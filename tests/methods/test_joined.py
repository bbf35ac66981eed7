"""Methods that join two losses, move features or train several times, in float64 to 1e-10."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.method import Method, Phase
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.kernels.keyed import normal
from letheon.loaders.batch import Batch, Stream
from letheon.methods.amun import Amun, attack
from letheon.methods.dual_optim import DualOptim
from letheon.methods.duck import Duck
from letheon.methods.finetune import Finetune, cross_entropy
from letheon.methods.gdr_gma import GdrGma
from letheon.methods.hamu import Hamu
from letheon.methods.jit import Jit
from letheon.methods.munba import Munba, bargain
from letheon.methods.pcgrad import PcGrad
from letheon.methods.random_label import RandomLabel, draw_labels
from letheon.methods.scar import Scar
from letheon.methods.sfron import Sfron
from letheon.methods.task_vectors import NegMerge, TaskVector
from tests.methods.double import (
    THREE,
    end_of,
    flat,
    gradient,
    gradients,
    join,
    same,
    step,
    unflat,
    whole,
)
from tests.methods.plain import ce, original, run_in_doubles, train_in_doubles
from tests.world import trained

LR = THREE.lr
LONG = replace(THREE, epochs=4, lr=0.5)
"""Far enough that the gradients of some tensors come to agree, others to conflict."""


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The retain and the forget half of a paired batch."""
    parts = [[t[batch.forget == flag] for t in batch[:4]] for flag in (False, True)]
    retain, forget = (Batch(*part, len(part[1])) for part in parts)  # type: ignore[call-overload]
    return retain, forget


def paired(
    method: Method, join_gradients: Callable[[Classifier, Batch, Batch], Tensor]
) -> tuple[Tensor, Tensor]:
    """The end of the run, and that of plain steps along minus `join_gradients`."""
    model, loader = original(), run_in_doubles(method).loader
    for epoch in range(method.recipe.epochs):
        for batch in loader.train("paired", epoch):
            step(model, -method.recipe.lr * join_gradients(model, *halves(batch)))
    return end_of(method), flat(model)


def random_labels(batch: Batch) -> Batch:
    drawn = draw_labels(batch, torch.arange(4), "other", 0, torch.tensor(0))
    return batch._replace(labels=drawn)


@pytest.mark.parametrize("clip", [1.0, 0.5, 0.0])
def test_munba_is_its_definition(clip: float) -> None:
    def joined(model: Classifier, retain: Batch, forget: Batch) -> Tensor:
        r, u = gradient(model, ce(model, retain)), gradient(model, ce(model, random_labels(forget)))
        cosine = r @ u / r.norm() / u.norm()
        alpha = torch.stack([1 / r.norm(), 1 / u.norm()]) / (1 + cosine).sqrt()
        gram = torch.stack([torch.stack([r @ r, r @ u]), torch.stack([r @ u, u @ u])])
        torch.testing.assert_close(gram @ alpha, 1 / alpha)  # the bargain itself
        whole = alpha[0] * r + alpha[1] * u
        return whole * min(1.0, clip / float(whole.norm())) if clip else whole

    same(*paired(Munba(THREE, clip=clip), joined))


def test_munba_where_gradients_vanish_or_oppose() -> None:
    one, nothing = [torch.tensor([3.0, 4.0])], [torch.zeros(2)]

    def length(grads: Sequence[torch.Tensor]) -> torch.Tensor:
        return grads[0].norm()

    assert torch.equal(bargain(one, nothing, 1.0, length)[0], torch.tensor([0.6, 0.8]))
    assert torch.equal(bargain(one, [-2 * one[0]], 1.0, length)[0], torch.zeros(2))
    assert torch.equal(bargain(nothing, nothing, 1.0, length)[0], torch.zeros(2))
    # Retain gradients of 0.02 beside 0.5, nearly orthogonal: the published quotient gives 449.
    small = bargain(
        [torch.tensor([0.02, 0.0])], [torch.tensor([0.0005, 0.5])], math.sqrt(2), length
    )[0]
    torch.testing.assert_close(small.norm(), torch.tensor(math.sqrt(2)))
    torch.testing.assert_close(small[1] / 0.5, torch.tensor(2.0), atol=0.01, rtol=0)


def test_gdr_gma_is_its_definition() -> None:
    conflicts = []

    def joined(model: Classifier, retain: Batch, forget: Batch) -> Tensor:
        loss = ce(model, retain)
        share = 1 / (1 + math.exp(3.0 * (float(loss) - 1.0)))
        result = []
        pair = (gradient(model, loss), -gradient(model, ce(model, forget)))
        for r, f in zip(*(unflat(one) for one in pair), strict=True):
            inner = (r * f).sum()
            conflicts.append(bool(inner < 0))
            r_new = r - inner / f.norm() ** 2 * f if inner < 0 else r
            f_new = f - inner / r.norm() ** 2 * r if inner < 0 else f
            result.append((1 - share) * r_new + share * f_new)
        return join(result)

    same(*paired(GdrGma(replace(LONG, lr=0.1), gamma=3.0, epsilon=1.0), joined))
    assert {True, False} == set(conflicts)


def test_pcgrad_is_its_definition() -> None:
    conflicts = []

    def joined(model: Classifier, retain: Batch, forget: Batch) -> Tensor:
        r, f = gradient(model, ce(model, retain)), -gradient(model, ce(model, forget))
        conflicts.append(bool(r @ f < 0))
        if r @ f >= 0:
            return 0.7 * (r + f)
        return 0.7 * (r - (r @ f) / (f @ f) * f + f - (r @ f) / (r @ r) * r)

    same(*paired(PcGrad(LONG, weight=0.7), joined))
    assert set(conflicts) == {True, False}


@pytest.mark.parametrize("goal", ["quality", "unlearning"])
@pytest.mark.parametrize("ratio", [0.05, 2.0])
def test_hamu_is_its_definition(goal: str, ratio: float) -> None:
    cases = []

    def joined(model: Classifier, retain: Batch, forget: Batch) -> Tensor:
        r, f = gradient(model, ce(model, retain)), gradient(model, ce(model, forget))
        pair = (r, f) if goal == "quality" else (-f, -r)
        g, h = (unflat(one) for one in pair)
        total, result = sum(a.norm() * b.norm() for a, b in zip(g, h, strict=True)), []
        for a, b in zip(g, h, strict=True):
            radius, size = LR * a.norm(), (b * b).sum()
            budget = LR * ratio * a.norm() * b.norm() / total
            across = a - (a * b).sum() / size * b
            if (a * b).sum() <= -budget * a.norm() / radius:
                cases.append(1)
                change = -radius * a / a.norm()
            elif radius**2 < budget**2 / size:
                cases.append(2)
                change = budget / size * b
            else:
                cases.append(3)
                rest = (radius**2 - budget**2 / size).sqrt()
                change = budget / size * b - rest * across / across.norm()
            result.append(-change / LR)
        whole = join(result)
        return whole * min(1.0, 0.3 / (float(whole.norm()) + 1e-6))

    same(*paired(Hamu(LONG, goal=goal, ratio=ratio, clip=0.3), joined))  # type: ignore[arg-type]
    assert {2 if ratio > 1 else 3} <= set(cases)


@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_sfron_is_its_definition(fisher: str) -> None:
    method = Sfron(THREE, alpha=2.0, every=2, clip=0.7, fisher=fisher)  # type: ignore[arg-type]
    run, model = run_in_doubles(method), original()
    mask = join(method.prepare(run).masks)
    if fisher == "sample":
        sides = (gradients(part).square().mean(0) for part in ("forget", "retain"))
        assert torch.equal(mask, torch.ge(*sides))
        assert 0 < int(mask.sum()) < len(mask)
    climbs = run.loader.train(Stream("forget", steps=2), 0)
    for t, batch in enumerate(run.loader.train("retain", 0)):
        step(model, -LR * gradient(model, ce(model, batch)))
        if t % 2 == 0:
            forget = next(climbs)
            each = F.cross_entropy(model(forget.images).logits, forget.labels, reduction="none")
            weights = each.detach() ** -0.5
            weights /= weights.sum()
            alpha = 2.0 * (1 + math.cos(math.pi * (t // 2) / 2)) / 2
            grad = alpha * mask * gradient(model, -(weights * each).sum())
            step(model, -LR * grad * min(1.0, 0.7 / (float(grad.norm()) + 1e-6)))
    same(end_of(method), flat(model))
    if fisher == "batch":
        other = Sfron(THREE).prepare(run_in_doubles(method)).masks
        assert not torch.equal(mask, join(other))


def test_sfron_shares_a_momentum_by_name_alone() -> None:
    recipe = replace(THREE, momentum=0.9)
    assert not torch.equal(end_of(Sfron(recipe)), end_of(Sfron(recipe, optimizers="shared")))


def test_duck_is_its_definition() -> None:
    start, retained = original(), whole("retain")
    features = start(retained.images).features.detach()
    mean = torch.stack([features[retained.labels == c].mean(0) for c in (0, 1, 3)])

    def joined(model: Classifier, retain: Batch, forget: Batch) -> Tensor:
        clean = {int(i): row for i, row in zip(own.index, own_features, strict=True)}
        here = torch.stack([clean[int(i)] for i in forget.index])
        goal = mean[F.cosine_similarity(here[:, None], mean[None], dim=2).argmax(1)]
        near = F.cosine_similarity(model(forget.images).features, goal)
        kept = F.cross_entropy(model(retain.images).logits / 2.0, retain.labels)
        return gradient(model, 1.5 * (1 - near).mean() + 1.4 * kept)

    own = whole("forget")
    own_features = start(own.images).features.detach()
    same(*paired(Duck(THREE, distance_weight=1.5, until=0.0), joined))


def precision(g: Tensor) -> Tensor:
    sigma, eye = torch.cov(g.T, correction=0), torch.eye(g.shape[1])
    for _ in range(2):
        off = sigma[~eye.bool()]
        sigma = sigma + 3 * sigma.diag().mean() * eye + 2 * off.mean() * (1 - eye)
    return torch.linalg.pinv(sigma / sigma.diag().outer(sigma.diag()).sqrt())


def test_scar_is_its_definition() -> None:
    start, kept, own = original(), whole("retain"), whole("forget")
    powers = [start(kept.images).features[kept.labels == c].detach() ** 0.5 for c in (0, 1, 3)]
    mean = torch.stack([F.normalize(g.mean(0), dim=0) for g in powers])
    inverse = torch.stack([precision(g) for g in powers])

    def distances(features: Tensor) -> Tensor:
        apart = F.normalize(features**0.5, dim=1)[:, None] - mean  # (B, 3, D)
        return (apart[:, :, None] @ inverse @ apart[..., None])[..., 0, 0]

    targets = distances(start(own.images).features.detach()).argmin(1)

    def joined(model: Classifier, retain: Batch, forget: Batch) -> Tensor:
        to = torch.stack([targets[own.index == i][0] for i in forget.index])
        far = distances(model(forget.images).features)[torch.arange(len(to)), to].mean()
        goal = start(retain.images).logits.detach() / 2
        goal[:, 2] = goal.amin(1)
        kl = F.kl_div(
            model(retain.images).logits.log_softmax(1), goal.softmax(1), reduction="batchmean"
        )
        return gradient(model, far + 5 * kl)

    same(*paired(Scar(THREE, shrink_others=2.0, temperature=2.0, until=0.0), joined))


def test_amun_is_its_definition() -> None:
    method = Amun(replace(THREE, batch_size=6), radius=0.5, doublings=4, steps=5)
    start, own = original(), whole("forget")
    found = {}
    for row, (image, label) in enumerate(zip(own.images, own.labels, strict=True)):
        for k in range(5):
            size, moved = 0.5 * 2**k, image[None]
            for _ in range(5):
                moved = moved.detach().requires_grad_(True)
                loss = F.cross_entropy(start(moved).logits, label[None])
                (slope,) = torch.autograd.grad(loss, moved)
                off = moved.detach() + slope / slope.norm() * size / 10 - image
                moved = image + off * min(1.0, size / float(off.norm()))
            answer = start(moved).logits.argmax(1).detach()
            found[int(own.index[row])] = (moved.detach(), answer)
            if answer != label:
                break
    model, loader = original(), run_in_doubles(method).loader
    others = loader.train(Stream("forget", steps=3), 0)
    for t, batch in enumerate(loader.train("mixed", 0)):
        step(model, -LR * gradient(model, ce(model, batch)))
        if t % 3:  # 7 steps over all samples, 2 over the forget set
            continue
        images, labels = zip(*(found[int(i)] for i in next(others).index), strict=True)
        loss = F.cross_entropy(model(torch.cat(images)).logits, torch.cat(labels))
        step(model, -LR * gradient(model, loss))
    same(end_of(method), flat(model))
    labels = torch.tensor([int(found[int(i)][1]) for i in own.index])
    assert (labels != own.labels).sum() > len(labels) / 2


def test_an_attack_stays_in_its_ball() -> None:
    own = whole("forget")
    radius = torch.linspace(0.01, 1, len(own.labels)).double()
    moved = attack(original(), own.images, own.labels, radius, 30) - own.images
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), radius, atol=0.01, rtol=0.05)


def test_jit_is_its_definition() -> None:
    method = Jit(replace(THREE, epochs=3), sigma=0.4, copies=2)
    model = original()
    for epoch in range(3):
        for batch in run_in_doubles(method).loader.train("forget", epoch):
            clean, loss = model(batch.images).logits, torch.zeros(()).double()
            for k in range(2):
                draws = normal(0, f"jit-{k}", epoch, batch.index, batch.images[0].numel())
                noise = 0.4 * draws.view(batch.images.shape)
                gap = (clean - model(batch.images + noise).logits.detach()).norm(dim=1)
                loss = loss + (gap / noise.flatten(1).norm(dim=1)).mean() / 2
            step(model, -LR * gradient(model, loss))
    same(end_of(method), flat(model))


def test_dual_optim_is_its_definition() -> None:
    inner = RandomLabel(replace(THREE, momentum=0.9, schedule="linear"), order="sequential")
    model, loader = original(), run_in_doubles(inner).loader
    weights = list(model.parameters())
    adamw = torch.optim.AdamW(weights, 1e-2, weight_decay=0.1)
    sgd = torch.optim.SGD(weights, LR, 0.9)
    for reads, optimizer, rate in (("forget", adamw, 1e-2), ("retain", sgd, LR)):
        batches = list(loader.train(reads, 0))  # type: ignore[arg-type]
        for number, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate * (1 - number / len(batches))
            optimizer.zero_grad()
            ce(model, random_labels(batch) if reads == "forget" else batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    same(end_of(DualOptim(inner, forget_lr=1e-2, forget_decay=0.1)), flat(model))


def learned(rate: float, epochs: range) -> Tensor:
    """The change that steps on the forget set make."""
    model = original()
    for epoch in epochs:
        for batch in run_in_doubles(TaskVector(THREE)).loader.train("forget", epoch):
            step(model, -rate * gradient(model, ce(model, batch)))
    return flat(model) - flat(original())


def test_a_task_vector_is_subtracted() -> None:
    expected = flat(original()) - 0.5 * learned(LR, range(3))
    same(end_of(TaskVector(replace(THREE, epochs=3), scale=0.5)), expected)


def test_negmerge_subtracts_what_all_agree_on() -> None:
    vectors = torch.stack([learned(50 * LR, range(2)), learned(LR, range(2, 4))])
    agree = vectors[0].sign() == vectors[1].sign()
    assert 0 < int(agree.sum()) < len(agree)
    expected = flat(original()) - torch.where(agree, vectors.mean(0), 0)
    same(end_of(NegMerge(replace(THREE, epochs=4), rates=(50.0, 1.0))), expected)


def test_what_was_read_is_what_the_page_says() -> None:
    """31 retain and 10 forget samples, in batches of 12."""

    def read(method: Method) -> list[tuple[object, object]]:
        lines = trained(method)[1]
        return [(x["forget_read"], x["retain_read"]) for x in lines if x["kind"] == "phase"]

    moved = (Duck(THREE, until=0.0), Scar(THREE, until=0.0))
    for one in (Munba(THREE), GdrGma(THREE), PcGrad(THREE), Hamu(THREE), *moved):
        assert read(one) == [(31, 31)]
    assert read(Sfron(THREE, every=2)) == [(0, 31), (20, 0)]
    assert read(Amun(THREE, radius=1.0)) == [(10, 31), (10, 0)]
    assert read(Amun(THREE, radius=1.0, images="forget")) == [(10, 0), (10, 0)]
    assert read(DualOptim(RandomLabel(THREE, order="sequential"))) == [(10, 0), (0, 31)]
    for one in (Jit(THREE), TaskVector(THREE), NegMerge(THREE, rates=(1.0,))):
        assert read(one) == [(10, 0)]


def test_settings_out_of_range_are_refused() -> None:
    for make in (
        lambda: Munba(clip=-1.0),
        lambda: GdrGma(gamma=0.0),
        lambda: Hamu(ratio=-1.0),
        lambda: Sfron(every=0),
        lambda: Sfron(clip=float("nan")),
        lambda: Duck(temperature=0.0),
        lambda: Scar(until=1.5),
        lambda: Amun(steps=0),
        lambda: Jit(copies=0),
        lambda: DualOptim(Finetune(), forget_lr=-1.0),
        lambda: NegMerge(rates=()),
        lambda: NegMerge(rates=(1.0, 0.0, 1.0)),
        lambda: NegMerge(replace(THREE, epochs=4)),
        lambda: TaskVector(replace(THREE, ema=0.5)),
        lambda: Phase("retain", "retain", cross_entropy, every=0),
    ):
        with pytest.raises(InputError, match="got .* expected"):
            make()


def test_what_a_method_cannot_work_with_is_refused() -> None:
    micro = replace(THREE, grad_accum_steps=2)
    for method in (GdrGma(micro), Sfron(micro)):
        with pytest.raises(InputError, match="got 2 micro-batches"):
            method.check(run_in_doubles(method))
    run = run_in_doubles(Duck())
    run.forget = torch.ones_like(run.forget)
    for method in (Munba(), GdrGma(), Hamu(), Sfron(), Duck(), Scar(), Amun()):
        with pytest.raises(InputError, match="got no retain samples"):
            method.check(run)


@pytest.mark.parametrize("method", [Duck(until=0.0), Scar(until=0.0)])
def test_a_lone_class_has_nowhere_to_send_samples(method: Method) -> None:
    run = run_in_doubles(method)
    labels = {
        int(row): int(label)
        for batch in run.loader.sweep()
        for row, label in zip(batch.index, batch.labels, strict=True)
    }
    run.forget = torch.tensor([labels[i] != 0 for i in range(len(run.forget))])
    with pytest.raises(InputError, match="got 1 classes with retain samples"):
        method.prepare(run)


def test_single_samples_go_to_another_class() -> None:
    for method in (Duck(THREE, until=0.0), Scar(THREE, until=0.0)):
        run = run_in_doubles(method)
        run.forget_classes = ()
        run.forget = torch.arange(len(run.forget)) % 5 == 0
        state = method.prepare(run)
        labels = torch.cat([batch.labels for batch in run.loader.sweep()])
        assert (state.targets != labels)[run.forget].all()


@pytest.mark.parametrize("method", [Duck, Scar])
def test_the_training_ends_once_the_forget_set_is_forgotten(method: type[Duck | Scar]) -> None:
    for until, epochs in ((1.0, 1), (0.0, 3)):
        run, reads = train_in_doubles(method(replace(THREE, epochs=3), until=until))
        assert len(reads) == epochs
        assert run.epoch_number == epochs - 1
