"""CMF, L2UL, Spotter and DUCK's second stage against plain references, in float64 to 1e-10."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.loop import run_method
from letheon.engine.method import Accuracies, Method
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.kernels.keyed import normal, uniform
from letheon.loaders.batch import Batch
from letheon.methods.amun import Amun
from letheon.methods.cmf import Cmf
from letheon.methods.duck import Duck
from letheon.methods.l2ul import L2ul, spread_out
from letheon.methods.pcgrad import PcGrad
from letheon.methods.random_label import draw_labels
from letheon.methods.spotter import Spotter
from tests.methods.double import end_of, flat, gradient, gradients, join, same, step, unflat, whole
from tests.methods.plain import (
    FORGET,
    RECIPE,
    Doubles,
    assert_same,
    divergence,
    original,
    run_in_doubles,
    train_in_doubles,
)
from tests.world import PRESET, run_of, trained


def test_cmf_is_its_definition() -> None:
    run, reads = train_in_doubles(Cmf(replace(RECIPE, epochs=2, lr=1.0), scale=3.0))
    retain, net, means = whole("retain"), original(), torch.zeros(4, 6).double()

    def align(net: Classifier, batch: Batch) -> Tensor:
        scores = F.cosine_similarity(net(batch.images).features[:, None], means[None], dim=2)
        return F.cross_entropy(3 * scores, batch.labels)

    run.recipe = replace(run.recipe, epochs=1)
    weights = list(net.parameters())[:-2]
    sgd = torch.optim.SGD(weights, 1.0, 0.9, weight_decay=0.01)
    for epoch in range(3):
        features = net.eval()(retain.images).features.detach()
        for c in (0, 1, 3):  # 2 is forgotten
            means[c] = features[retain.labels == c].mean(0)
        for batch in run.loader.train("retain", epoch) if epoch < 2 else ():
            sgd.zero_grad()
            align(net, batch).backward()  # type: ignore[no-untyped-call]
            sgd.step()
    net.head.weight.data = 3 * F.normalize(means, dim=1) / features.square().sum(1).mean().sqrt()
    net.head.bias.data.zero_()
    assert_same(run, net)
    assert reads == [(0, 31)] * 2 and run.model.head.weight.requires_grad
    cosines = F.normalize(features, dim=1) @ F.normalize(means, dim=1).T
    assert torch.equal(run.model(retain.images).logits.argmax(1), cosines.argmax(1))


def test_cmf_measures_no_accuracy() -> None:
    """Its look after an epoch reads no forget or held-out image."""
    _, lines = trained(Cmf(replace(RECIPE, epochs=2)))
    [*looks] = [line for line in lines if line["kind"] == "after epoch"]
    assert len(looks) == 2 and all(line["forget"] is None for line in looks)


def test_a_method_that_waits_for_the_forget_set_reads_it_alone() -> None:
    method = L2ul(replace(FORGET, epochs=2), images=2, beside=1, steps=1)
    run = run_of(method)
    swept: list[int] = []
    whole = run.loader.sweep

    def sweep(indices: Any = None, skip: int = 0) -> Any:
        for batch in whole(indices, skip):
            swept.extend(batch.index.tolist())
            yield batch

    run.loader.sweep = sweep  # type: ignore[method-assign]
    run_method(method, run)
    assert swept and bool(run.forget[torch.tensor(swept)].all())


def test_l2uls_images_come_batch_by_batch() -> None:
    """Groups of batch-norm are of the batch's order: copy 0 of all samples, then copy 1."""
    method = L2ul(replace(FORGET, epochs=1), images=2, beside=2, steps=1, until=0.0)
    run = run_of(method)
    state = method.prepare(run)
    [phase] = method.phases(run, state, 0)
    batch = next(iter(run.loader.train("forget", 0)))
    seen: list[Tensor] = []

    def net(images: Tensor) -> Any:
        seen.append(images)
        return run.model(images)

    assert phase.rows is not None
    phase.loss(net, phase.rows.attach(batch))  # type: ignore[arg-type]
    rows = state.place[batch.index]
    count = len(batch.labels)
    for copy in range(2):
        part = seen[0][count * (copy + 1) : count * (copy + 2)]
        assert torch.equal(part, state.images.own[rows, copy].to(part.dtype))


def misleading(batch: Batch, number: int, radius: float) -> tuple[Tensor, Tensor]:
    """Four steps of 0.1 of targeted l2 descent in pixels, one image at a time."""
    rows, std = [], torch.tensor(PRESET.std).double()[:, None, None]
    goals = draw_labels(batch, torch.arange(4), "other", 0, torch.tensor(number))
    for image, index, goal in zip(batch.images, batch.index[:, None], goals, strict=True):
        d = normal(0, "l2ul", number, index, image.numel()).view(image.shape)
        d = d / d.norm() * radius * uniform(0, "l2ul-length", number, index, 1)[0]
        for _ in range(4):
            d.requires_grad_(True)
            loss = F.cross_entropy(original()((image + d / std)[None]).logits, goal[None])
            (slope,) = torch.autograd.grad(loss, d)
            d = d.detach() - 0.1 * slope / slope.norm()
            d = d * min(1.0, radius / float(d.norm()))
        rows.append(image + d / std)
    return torch.stack(rows), goals


@pytest.mark.parametrize("radius", [0.2, 4.0])
def test_l2ul_is_its_definition(radius: float) -> None:
    recipe = replace(FORGET, momentum=0.0, weight_decay=0.0)
    method = L2ul(recipe, images=3, beside=2, radius=radius, steps=4, weight=5.0, until=0.0)
    net, own, start = original(), whole("forget"), flat(original())
    lengths = gradients("forget", lambda m, b: m(b.images).logits.norm(dim=1).mean())
    importance = [p.abs() for p in unflat(lengths.abs().mean(0))]
    pull = join([1 - (p - p.min()) / (p.max() - p.min()) for p in importance])
    others = [misleading(own, number, radius) for number in range(3)]
    for batch in run_in_doubles(method).loader.train("forget", 0):
        place = [int((own.index == i).nonzero()) for i in batch.index]
        losses = [-F.cross_entropy(net(batch.images).logits, batch.labels, reduction="none")]
        for images, goals in others[:2]:
            logits = net(images[place]).logits
            losses.append(F.cross_entropy(logits, goals[place], reduction="none"))
        step(
            net, -0.05 * (gradient(net, torch.cat(losses).mean()) + 5 * pull * (flat(net) - start))
        )
    same(end_of(method), flat(net))


@pytest.mark.parametrize("kind", [Amun, L2ul, Spotter])
def test_runs_that_search_alike_share_their_images(kind: Any) -> None:
    few = {"images": 2, "beside": 1, "steps": 2} if kind is L2ul else {"steps": 2}
    one, other, further = (kind(recipe=replace(RECIPE, lr=lr), **few) for lr in (0.1, 0.2, 0.1))
    further = replace(further, radius=2.0)
    shared: dict[Any, Any] = {}
    runs = [run_of(method) for method in (one, other, further)]
    for run in runs:
        run.shared, run.loader = shared, runs[0].loader
    first, second, third = (
        m.prepare(run) for m, run in zip((one, other, further), runs, strict=True)
    )
    alone: Any = other.prepare(run_of(other))
    assert first.images is second.images is not third.images
    assert torch.equal(second.images.own, alone.images.own)
    assert first is not second  # each run saves and restores its own


def test_l2ul_takes_the_next_images_and_ends_with_the_last_right_answer() -> None:
    one = L2ul(replace(FORGET, epochs=2), images=3, beside=2, steps=1, until=0.0)
    assert [x["forget_read"] for x in trained(one)[1] if x["kind"] == "phase"] == [10, 10]
    state, run = one.prepare(run_in_doubles(one)), run_in_doubles(one)
    batch = next(iter(run.loader.train("forget", 0)))
    losses = []
    for epoch in (0, 1, 3):
        run.epoch.fill_(epoch)
        [phase] = one.phases(run, state, epoch)
        assert phase.rows is not None
        own = phase.rows.attach(batch)
        losses.append(float(phase.loss(run.model, own).detach()))  # type: ignore[arg-type]
    assert losses[0] != losses[1] and losses[0] == losses[2]  # images 0 1, 2 0, 0 1 of 3
    for accuracy, decision in ((0.1, "go on"), (0.0, "stop")):
        looks = Accuracies(accuracy, 1.0, None, None)
        assert L2ul().after_epoch(run, state, looks) == decision
    few = L2ul(images=1, beside=1, steps=1, importance="batch")
    batches = few.prepare(run_in_doubles(few)).pull
    assert any(not torch.equal(*pair) for pair in zip(batches, state.pull, strict=True))


@pytest.mark.parametrize("by_class", [True, False])
def test_spotter_is_its_definition(by_class: bool) -> None:
    recipe = replace(FORGET, momentum=0.0, weight_decay=0.0)
    method = Spotter(recipe, share=0.6, weight=2.0, radius=0.4, step=0.3, steps=2)
    forgotten = () if by_class else (2, 5, 9, 12, 16, 20, 31, 37)
    run, net, start, near = run_of(method, forgotten=forgotten), original(), original(), {}
    run.model, run.loader = run.model.double(), Doubles(run.loader)
    for batch in run.loader.sweep(run.forget.nonzero().flatten().tolist()):
        for image, label, index in zip(batch.images, batch.labels, batch.index, strict=True):
            wrong = start(image[None]).logits[0].detach()
            wrong[label] = -torch.inf
            u = uniform(0, "spotter", 0, index[None], image.numel()).view(image.shape)
            moved = image + 0.4 * (2 * u - 1)
            for _ in range(2):
                moved.requires_grad_(True)
                loss = F.cross_entropy(start(moved[None]).logits, wrong.argmax()[None])
                (slope,) = torch.autograd.grad(loss, moved)
                moved = moved.detach() + 0.3 * slope.sign()
                moved = torch.minimum(torch.maximum(moved, image - 0.4), image + 0.4)
            near[int(index)] = moved
    for batch in run.loader.train("forget", 0):
        loss = torch.zeros(())
        for share, images in (
            (0.6, batch.images),
            (0.4, torch.stack([near[int(i)] for i in batch.index])),
        ):
            goal = start(images).logits.softmax(1).detach()
            goal[(slice(None), 2) if by_class else (range(len(goal)), batch.labels)] = 0
            goal, answer = goal / goal.sum(1, keepdim=True), net(images).logits.softmax(1)
            loss = loss + share * divergence(goal, answer).mean()
        z, pairs = net(batch.images).features, []
        for i, j in itertools.permutations(range(len(z)), 2):
            if batch.labels[i] == batch.labels[j]:
                pairs.append(F.cosine_similarity(z[i], z[j], dim=0))
        step(net, -0.05 * gradient(net, loss + 2 * torch.stack(pairs).mean()))
    run_method(method, run)
    same(flat(run.model), flat(net))


def test_what_spotter_reads() -> None:
    lines = trained(Spotter(FORGET))[1]
    assert [(x["forget_read"], x["retain_read"]) for x in lines if x["kind"] == "phase"] == [
        (10, 0)
    ]


def test_an_importance_without_spread_holds_evenly() -> None:
    assert torch.equal(spread_out(torch.zeros(3), torch.zeros(()), torch.zeros(())), torch.ones(3))


@pytest.mark.parametrize("until", [0.0, 1.0])
def test_ducks_second_stage(until: float) -> None:
    """By its own rate, batches, weights and optimizer; from the first look that finds it done."""
    recipe = replace(RECIPE, epochs=4, optimizer="adamw", weight_decay=0.0)
    method = Duck(recipe, until=until, second_epochs=2, second_lr=0.02, second_batch_size=20)
    run, reads = train_in_doubles(method)
    state, net = method.prepare(run_in_doubles(method)), original()

    def loss(net: Classifier, batch: Batch, far: float, kept: float) -> Tensor:
        logits, features = net(batch.images)
        goal = state.centroids[state.targets[batch.index]]
        near = F.cosine_similarity(features, goal)[batch.forget]
        rest = ~batch.forget
        return far * (1 - near).mean() + kept * F.cross_entropy(
            logits[rest] / 2, batch.labels[rest]
        )

    first = 1 if until else 2  # forgotten after the first epoch, or never asked
    stages = [(range(first), None, 0.05, 1.0, 1.4), (range(first, first + 2), 20, 0.02, 0.1, 1.0)]
    for epochs, size, rate, far, kept in stages:
        adam = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.0)
        for epoch in epochs:
            stream = method.phases(run, state, 0)[0].stream
            for batch in run.loader.train(stream._replace(batch_size=size), epoch):
                adam.zero_grad()
                loss(net, batch, far, kept).backward()  # type: ignore[no-untyped-call]
                adam.step()
    assert_same(run, net)
    assert reads == [(31, 31)] * (first + 2)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Duck, {"second_epochs": 11}),
        (Duck, {"second_lr": -1.0}),
        (Cmf, {"scale": 0.0}),
        (L2ul, {"images": 0}),
        (L2ul, {"beside": 21}),
        (L2ul, {"radius": float("nan")}),
        (L2ul, {"weight": -1.0}),
        (Spotter, {"share": 1.1}),
        (Spotter, {"radius": 0.0}),
        (PcGrad, {"weight": -1.0}),
    ],
)
def test_values_out_of_range_are_refused(kind: type[Method], wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"got .* expected") as error:
        kind(**wrong)
    assert error.value.option in wrong
