"""Methods that read the forget set, alone or beside the retain set, against plain references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.models.classifier import Classifier
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Batch
from letheon.methods.boundary_expanding import BoundaryExpanding
from letheon.methods.boundary_shrink import BoundaryShrink
from letheon.methods.contrastive import Contrastive
from letheon.methods.delete import Delete
from letheon.methods.neg_grad_plus import NegGradPlus
from letheon.methods.one_point import OnePoint
from letheon.methods.pseudo_label import PseudoLabel
from letheon.methods.salun_soft import SalUnSoft
from tests.methods.plain import (
    FORGET,
    MIXED,
    RECIPE,
    assert_same,
    ce,
    descend,
    divergence,
    original,
    run_in_doubles,
    train_in_doubles,
)  # fmt: skip

TEACHER = original()


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The retain and the forget half."""
    n = len(batch.labels) // 2
    first, second = ([tensor[rows] for tensor in batch[:4]] for rows in (slice(n), slice(n, None)))
    return Batch(*first, n), Batch(*second, n)


def test_neg_grad_plus() -> None:
    def loss(net: Classifier, batch: Batch) -> Tensor:
        retain, forget = halves(batch)
        return 0.9 * ce(net, retain) - 0.1 * ce(net, forget)

    run, reads = train_in_doubles(NegGradPlus(RECIPE, alpha=0.9))
    assert_same(run, descend(run, lambda epoch: [("paired", loss)]))
    assert reads == [(31, 31)]


def test_one_point_contraction() -> None:
    def loss(net: Classifier, batch: Batch) -> Tensor:
        retain, forget = halves(batch)
        lengths = net(forget.images).logits.square().sum(1).sqrt()
        return ce(net, retain) + 0.7 * lengths.mean()

    run, reads = train_in_doubles(OnePoint(RECIPE, weight=0.7))
    assert_same(run, descend(run, lambda epoch: [("paired", loss)]))
    assert reads == [(31, 31)]


@pytest.mark.parametrize("by_class", [True, False])
def test_contrastive_unlearning(by_class: bool) -> None:
    """With whole classes and with single samples to forget: with and without retained siblings."""

    def contrast(net: Classifier, batch: Batch) -> Tensor:
        retain, forget = halves(batch)
        zr, zf = (F.normalize(net(part.images).features, dim=1) for part in (retain, forget))
        rows = []
        for i, label in enumerate(forget.labels):
            own = [zf[i] @ z / 0.5 for z in zr[retain.labels == label]]
            if not own:
                own = [zf[i] @ zf[j] / 0.5 for j in range(len(zf)) if j != i]
            other = [zf[i] @ z / 0.5 for z in zr[retain.labels != label]]
            rows.append(torch.stack(own).logsumexp(0) - torch.stack(other).mean())
        return 0.6 * ce(net, retain) + 0.4 * torch.stack(rows).mean()

    method = Contrastive(RECIPE, temperature=0.5)
    run = run_in_doubles(method)
    if not by_class:  # 10 samples of all classes
        run.forget = torch.arange(41) % 4 == 0
        run.forget[40] = False
        run.loader.loader.forget = run.forget.numpy()  # type: ignore[attr-defined]
        run.forget_classes = ()
    run, reads = train_in_doubles(method, run)
    assert_same(run, descend(run, lambda epoch: [("paired", contrast)]))
    assert reads == [(31, 31)]


def masked(batch: Batch) -> Tensor:
    """The original's logits without each sample's own class."""
    own = torch.eye(4, dtype=torch.bool)[batch.labels]
    with torch.no_grad():
        return TEACHER(batch.images).logits.masked_fill(own, -torch.inf)


def test_delete() -> None:
    def loss(net: Classifier, batch: Batch) -> Tensor:
        return divergence(masked(batch).softmax(1), net(batch.images).logits.softmax(1)).mean()

    run, reads = train_in_doubles(Delete(FORGET))
    assert_same(run, descend(run, lambda epoch: [("forget", loss)]))
    assert reads == [(10, 0)]


@pytest.mark.parametrize("classes", [(2,), (1, 2), ()])
def test_pseudo_label(classes: tuple[int, ...]) -> None:
    """Class 2 is forgotten; whatever else is named is no label either."""

    def loss(net: Classifier, batch: Batch) -> Tensor:
        goal = masked(batch)
        goal[:, list(classes)] = -torch.inf
        return F.cross_entropy(net(batch.images).logits, goal.argmax(1))

    method = PseudoLabel(FORGET)
    run = run_in_doubles(method)
    run.forget_classes = classes
    run, reads = train_in_doubles(method, run)
    assert_same(run, descend(run, lambda epoch: [("forget", loss)]))
    assert reads == [(10, 0)]


def across(batch: Batch, epsilon: float) -> Tensor:
    """The original's logits one sign step of `epsilon` up its loss."""
    images = batch.images.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(
        F.cross_entropy(TEACHER(images).logits, batch.labels, reduction="sum"), images
    )
    pixels = (batch.images * 0.25 + 0.5 + epsilon * slope.sign()).clamp(0, 1)
    with torch.no_grad():
        return TEACHER(((pixels * 255).round() / 255 - 0.5) / 0.25).logits


@pytest.mark.parametrize("target", ["other", "any"])
def test_boundary_shrink(target: str) -> None:
    def loss(net: Classifier, batch: Batch) -> Tensor:
        goal = across(batch, 0.05)
        if target == "other":
            goal[torch.arange(len(goal)), batch.labels] = -torch.inf
        return F.cross_entropy(net(batch.images).logits, goal.argmax(1))

    method = BoundaryShrink(FORGET, epsilon=0.05, target=target)  # type: ignore[arg-type]
    run, reads = train_in_doubles(method)
    assert_same(run, descend(run, lambda epoch: [("forget", loss)]))
    assert reads == [(10, 0)]


def test_the_published_boundary_may_teach_the_true_class() -> None:
    batches = list(run_in_doubles(BoundaryShrink(FORGET)).loader.train("forget", 0))
    hits = [across(batch, 0.0).argmax(1) == batch.labels for batch in batches]
    assert torch.cat(hits).any()  # so that both targets differ, which the reference tells apart


def test_boundary_expanding() -> None:
    def loss(net: Classifier, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch.images).logits, torch.full_like(batch.labels, 4))

    run, reads = train_in_doubles(BoundaryExpanding(FORGET))
    wide, head = original(), original().head
    draws = uniform(0, "boundary-expanding", 0, torch.arange(7), 1)[:, 0]
    row = (2 * draws - 1) / 6**0.5
    wide.head.weight = torch.nn.Parameter(torch.cat([head.weight.detach(), row[None, :6]]))
    wide.head.bias = torch.nn.Parameter(torch.cat([head.bias.detach(), row[6:]]))
    net = descend(run, lambda epoch: [("forget", loss)], wide)
    net.head.weight = torch.nn.Parameter(net.head.weight[:4])
    net.head.bias = torch.nn.Parameter(net.head.bias[:4])
    assert_same(run, net)
    assert run.model.classes == 4 and reads == [(10, 0)]


@pytest.mark.parametrize("origin", ["start", "epoch"])
def test_salun_soft(origin: str) -> None:
    method = SalUnSoft(replace(MIXED, epochs=2), density=0.6, origin=origin)  # type: ignore[arg-type]
    run, reads = train_in_doubles(method)

    def relabel(net: Classifier, batch: Batch) -> Tensor:
        u = uniform(0, "random-label", run.epoch, batch.index, 1)[:, 0]
        others = torch.tensor([[c for c in range(4) if c != int(y)] for y in batch.labels])
        drawn = others[torch.arange(len(u)), (u * 3).long()]
        labels = torch.where(batch.forget, drawn, batch.labels)
        return F.cross_entropy(net(batch.images).logits, labels)

    base, steps = torch.cat([p.detach().flatten() for p in original().parameters()]), [0]

    def soften(net: Classifier) -> None:
        steps[0] += 1
        now = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        change, rank = now - base, int(0.6 * (1 - steps[0] / 6) * len(base))
        cut = change.abs().sort().values[rank - 1] if rank else 0
        now = base + change.sign() * (change.abs() - cut).clamp(min=0)
        torch.nn.utils.vector_to_parameters(now.clone(), net.parameters())
        if origin == "epoch" and steps[0] == 3:
            base.copy_(now)

    assert_same(run, descend(run, lambda epoch: [("mixed", relabel)], after_step=soften))
    assert reads == [(10, 31)] * 2
