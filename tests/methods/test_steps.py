"""Each method's whole run against its definition in float64, to 1e-10, and what it read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.recipe import Recipe
from letheon.errors import InputError, RunFailed
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Batch
from letheon.methods.finetune import Finetune
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.head_distillation import HeadDistillation
from letheon.methods.l1_sparse import L1Sparse
from letheon.methods.random_label import RandomLabel, draw_labels
from letheon.methods.retrain import Retrain
from letheon.methods.salun import SalUn
from letheon.methods.spkd import Spkd
from tests.methods.plain import original, run_in_doubles, train_in_doubles
from tests.world import FORGOTTEN, network, run_of, trained

RECIPE = Recipe(epochs=2, lr=0.02, batch_size=8, weight_decay=0.01, batch_norm="frozen")


def reference(
    run: Run,
    losses: list[tuple[str, Callable[..., Tensor]]],
    penalty: Callable[[int], float] = lambda epoch: 0.0,
    masks: list[Tensor] | None = None,
) -> list[Tensor]:
    """Plain SGD with momentum and decay, written out: the weights at the end."""
    model, recipe = original(), run.recipe
    weights = list(model.parameters())
    start = [w.detach().clone() for w in weights]
    velocity: list[Tensor | None] = [None] * len(weights)
    for epoch in range(recipe.epochs):
        for reads, loss in losses:
            for batch in run.loader.train(reads, epoch):  # type: ignore[arg-type]
                value = loss(model, batch, epoch)
                value = value + penalty(epoch) * sum(w.abs().sum() for w in weights)
                grads = torch.autograd.grad(value, weights)
                with torch.no_grad():
                    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
                        g = g + recipe.weight_decay * w
                        velocity[i] = (
                            g if velocity[i] is None else recipe.momentum * velocity[i] + g
                        )
                        w -= recipe.lr * velocity[i]
                        if masks is not None:
                            w.copy_(torch.where(masks[i], w, start[i]))
    return weights


def ce(model: torch.nn.Module, batch: Batch, epoch: int) -> Tensor:
    return F.cross_entropy(model(batch.images).logits, batch.labels)


def relabeled(model: torch.nn.Module, batch: Batch, epoch: int) -> Tensor:
    u = uniform(0, "random-label", epoch, batch.index, 1)[:, 0]
    others = torch.tensor([[c for c in range(4) if c != int(y)] for y in batch.labels])
    drawn = others[torch.arange(len(u)), (u * 3).long()]
    return F.cross_entropy(
        model(batch.images).logits, torch.where(batch.forget, drawn, batch.labels)
    )


def similarity(model: torch.nn.Module, batch: Batch, epoch: int, squared: bool) -> Tensor:
    def normalised(f: Tensor) -> Tensor:
        gram = f @ f.T
        return gram / gram.norm(dim=1, keepdim=True)

    f = model(batch.images).features
    teacher = original()(batch.images).features.detach()
    distance = (normalised(f) - normalised(teacher)).norm()
    sp = (distance**2 if squared else distance) / len(f) ** 2
    return 2.0 * ce(model, batch, epoch) + 50.0 * sp


def bounded(model: torch.nn.Module, batch: Batch, epoch: int) -> Tensor:
    """Only the samples whose loss is below that of a guess among four classes pull."""
    losses = F.cross_entropy(model(batch.images).logits, batch.labels, reduction="none")
    low = losses < -torch.log(torch.tensor(1 / 4))
    return -losses[low].sum() / len(losses) if low.any() else 0 * losses.sum()


def relabeled_half(model: torch.nn.Module, batch: Batch, epoch: int) -> Tensor:
    """The mean over the relabeled half, and half as much of that over the retain half."""
    u = uniform(0, "random-label", epoch, batch.index, 1)[:, 0]
    others = torch.tensor([[c for c in range(4) if c != int(y)] for y in batch.labels])
    labels = torch.where(batch.forget, others[torch.arange(len(u)), (u * 3).long()], batch.labels)
    losses = F.cross_entropy(model(batch.images).logits, labels, reduction="none")
    return (losses[batch.forget].sum() + 0.5 * losses[~batch.forget].sum()) / len(losses)


CASES: dict[str, tuple[Method, list[tuple[str, Callable[..., Tensor]]]]] = {
    "retrain": (Retrain(RECIPE), [("retain", ce)]),
    "finetune": (Finetune(RECIPE), [("retain", ce)]),
    "grad-ascent": (GradAscent(RECIPE), [("forget", lambda *a: -ce(*a))]),
    "grad-ascent-bounded": (
        GradAscent(replace(RECIPE, lr=0.3), ascent="bounded"),
        [("forget", lambda *a: bounded(*a))],
    ),
    "random-label": (RandomLabel(RECIPE), [("mixed", relabeled)]),
    "random-label-paired": (
        RandomLabel(RECIPE, order="paired", alpha=0.5),
        [("paired", relabeled_half)],
    ),
    "random-label-sequential": (
        RandomLabel(RECIPE, order="sequential"),
        [("forget", relabeled), ("retain", ce)],
    ),
    "spkd": (
        Spkd(RECIPE, ce_weight=2.0, sp_weight=50.0),
        [("forget", lambda *a: -ce(*a)), ("retain", lambda *a: similarity(*a, squared=True))],
    ),
    "spkd-as-published": (
        Spkd(RECIPE, ce_weight=2.0, sp_weight=50.0, norm="unsquared"),
        [("forget", lambda *a: -ce(*a)), ("retain", lambda *a: similarity(*a, squared=False))],
    ),
}


COUNTS = {"retain": (0, 31), "forget": (10, 0), "mixed": (10, 31), "paired": (31, 31)}
"""Forget and retain samples that a pass of each stream reads."""


def assert_defined(
    method: Method, streams: list[str], expected: Callable[[Run], list[Tensor]]
) -> None:
    """The weights agree to 1e-10 with those of the definition, and the passes' counts."""
    run, reads = train_in_doubles(method)
    for ours, theirs in zip(run.model.parameters(), expected(run), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    assert reads == [COUNTS[stream] for stream in streams] * method.recipe.epochs


@pytest.mark.parametrize("name", CASES)
def test_method_is_its_definition(name: str) -> None:
    method, losses = CASES[name]
    assert_defined(method, [stream for stream, _ in losses], lambda run: reference(run, losses))


def test_l1_sparse_is_its_definition() -> None:
    method = L1Sparse(replace(RECIPE, epochs=3), alpha=0.01, free_epochs=1)
    falling = [0.01, 0.005, 0.0]
    assert_defined(
        method, ["retain"], lambda run: reference(run, [("retain", ce)], falling.__getitem__)
    )


def test_head_distillation_is_its_definition() -> None:
    def masked(model: Classifier, batch: Batch, epoch: int) -> Tensor:
        with torch.no_grad():
            goal = original()(batch.images).logits
            goal[:, list(FORGOTTEN)] = -torch.inf
        log_q = model(batch.images).logits.log_softmax(dim=1)
        return -(goal.softmax(dim=1) * log_q).sum(dim=1).mean()

    net = original()
    head = {id(p) for p in net.head.parameters()}
    moving = [torch.full_like(p, id(p) in head, dtype=torch.bool) for p in net.parameters()]
    assert_defined(
        HeadDistillation(RECIPE),
        ["mixed"],
        lambda run: reference(run, [("mixed", masked)], masks=moving),
    )


def test_head_distillation_leaves_the_encoder_as_it_was() -> None:
    run, _ = trained(HeadDistillation(replace(RECIPE, batch_norm="local")))
    before = network().net.state_dict()
    moved = {k for k, v in run.model.net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"5.weight", "5.bias"}
    assert all(p.requires_grad for p in run.model.parameters())
    run = run_of(HeadDistillation(RECIPE))
    run.forget_classes = ()
    with pytest.raises(InputError, match="whole classes"):
        HeadDistillation(RECIPE).check(run)


def test_salun_is_its_definition() -> None:
    method = SalUn(RandomLabel(RECIPE), density=0.4)
    masks = list(method.prepare(run_in_doubles(method)).masks.values())
    assert_defined(
        method, ["mixed"], lambda run: reference(run, [("mixed", relabeled)], masks=masks)
    )


@pytest.mark.parametrize("draw", ["other", "retained", "any"])
def test_draw_labels_follow_their_rule(draw: str) -> None:
    n = 4000
    labels = torch.arange(n) % 4
    batch = Batch(torch.empty(n, 0), labels, labels == 2, torch.arange(n), n)
    allowed = torch.tensor([0, 1, 3]) if draw == "retained" else torch.arange(4)
    drawn = draw_labels(batch, allowed, draw, 1, torch.tensor(0))  # type: ignore[arg-type]
    again = draw_labels(batch, allowed, draw, 1, torch.tensor(1))  # type: ignore[arg-type]
    assert set(drawn.tolist()) <= set(allowed.tolist())
    assert not torch.equal(drawn, again)
    if draw == "other":
        assert not (drawn == labels).any()
    if draw == "retained":
        assert not torch.isin(drawn, torch.tensor(FORGOTTEN)).any()
    counts = torch.bincount(drawn[labels == 0], minlength=4)
    expected = {"other": [0, 333, 333, 333], "retained": [333, 333, 0, 333], "any": [250] * 4}[draw]
    assert (counts - torch.tensor(expected)).abs().max() < 75  # about 5 standard deviations


def test_draw_labels_do_not_depend_on_the_place_in_the_batch() -> None:
    labels, index = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 9, 2, 7])
    batch = Batch(torch.empty(4, 0), labels, labels == 2, index, 4)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Batch(torch.empty(4, 0), labels[order], labels[order] == 2, index[order], 4)
    drawn = draw_labels(batch, torch.arange(4), "other", 3, torch.tensor(4))
    assert torch.equal(
        drawn[order], draw_labels(shuffled, torch.arange(4), "other", 3, torch.tensor(4))
    )


def test_batch_norm_of_a_forget_pass_stays_as_it_was() -> None:
    before = network().net.state_dict()
    kept, _ = trained(GradAscent(replace(RECIPE, batch_norm="local")))
    moved, _ = trained(GradAscent(replace(RECIPE, batch_norm="local"), forget_batch_norm="recipe"))
    assert torch.equal(kept.model.net.state_dict()["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(moved.model.net.state_dict()["1.running_mean"], before["1.running_mean"])


def test_values_out_of_range_are_refused() -> None:
    for make in (
        lambda: L1Sparse(alpha=-1.0),
        lambda: L1Sparse(free_epochs=11),
        lambda: RandomLabel(alpha=float("nan")),
        lambda: Spkd(sp_weight=-1.0),
        lambda: Recipe(lr=float("inf")),
        lambda: Recipe(batch_size=0),
        lambda: Recipe(momentum=1.0),
        lambda: Recipe(epochs=2, warmup=3),
    ):
        with pytest.raises(InputError, match="got .* expected"):
            make()


def test_no_forget_sample_in_a_retain_phase() -> None:
    _, lines = trained(Spkd(RECIPE, sp_weight=50.0))
    for line in lines:
        assert line["forget_read" if line["reads"] == "retain" else "retain_read"] == 0
    run = run_of(Finetune(RECIPE))
    run.forget = ~run.forget  # the loader and the run now disagree about what is to be forgotten
    with pytest.raises(RunFailed, match="reads retain but met"):
        run_method(Finetune(RECIPE), run)


def test_spkd_refuses_micro_batches_it_cannot_see_together() -> None:
    recipe = replace(RECIPE, grad_accum_steps=2)
    with pytest.raises(InputError, match="got 2 micro-batches"):
        Spkd(recipe).check(run_of(Spkd(recipe)))
    Spkd(recipe, gram="local").check(run_of(Spkd(recipe)))
