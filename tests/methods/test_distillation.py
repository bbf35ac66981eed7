"""Methods of distillation against plain references, and when SCRUB and LoTUS turn back or stop."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.method import Accuracies, BackTo
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.initial import fresh_seed, initial_copy
from letheon.errors import InputError
from letheon.kernels.keyed import uniform
from letheon.loaders.batch import Batch, Stream
from letheon.methods.akd import Akd
from letheon.methods.bad_teacher import BadTeacher
from letheon.methods.kd import Kd
from letheon.methods.lotus import Lotus
from letheon.methods.pl_spkd import PlSpkd
from letheon.methods.rkd import Rkd
from letheon.methods.scrub import Scrub, ScrubState
from tests.methods.plain import (
    MIXED,
    RECIPE,
    Passes,
    assert_same,
    ce,
    descend,
    divergence,
    original,
    run_in_doubles,
    train_in_doubles,
)  # fmt: skip

TEACHER = original()


def answer(batch: Batch) -> tuple[Tensor, Tensor]:
    """The original's logits and features."""
    with torch.no_grad():
        logits, features = TEACHER(batch.images)
    return logits, features


def kl(net: Classifier, batch: Batch, t: float) -> Tensor:
    """Mean divergence from the original at a temperature, times its square."""
    p = (answer(batch)[0] / t).softmax(1)
    return t**2 * divergence(p, (net(batch.images).logits / t).softmax(1)).mean()


def ascend(net: Classifier, batch: Batch) -> Tensor:
    return -ce(net, batch)


def relabel(net: Classifier, batch: Batch) -> Tensor:
    goal = answer(batch)[0]
    goal[:, 2] = -torch.inf
    return F.cross_entropy(net(batch.images).logits, goal.argmax(1))


def test_scrub() -> None:
    method = Scrub(replace(RECIPE, epochs=2), alpha=0.3, gamma=0.8, temperature=3.0, max_epochs=1,
                   forget_batch_size=5)  # fmt: skip

    def passes(epoch: int) -> Passes:
        climb = (Stream("forget", 5), lambda net, b: -kl(net, b, 3.0))
        down = ("retain", lambda net, b: 0.8 * ce(net, b) + 0.3 * kl(net, b, 3.0))
        return [climb, down] if epoch == 0 else [down]  # type: ignore[list-item]

    run, reads = train_in_doubles(method)
    assert_same(run, descend(run, passes))
    assert reads == [(10, 0), (0, 31), (0, 31)]


@pytest.mark.parametrize("reduction", ["sample", "element"])
def test_bad_teacher(reduction: str) -> None:
    untrained = initial_copy(original(), fresh_seed(0)).eval()

    def loss(net: Classifier, batch: Batch) -> Tensor:
        q = net(batch.images).logits.softmax(1)
        bad = divergence(untrained(batch.images).logits.softmax(1).detach(), q)
        good = divergence(answer(batch)[0].softmax(1), q)
        total = bad[batch.forget].sum() + good[~batch.forget].sum()
        return total / len(q) / (4 if reduction == "element" else 1)

    method = BadTeacher(replace(MIXED, batch_size=7), reduction=reduction)  # type: ignore[arg-type]
    run, reads = train_in_doubles(method)
    assert_same(run, descend(run, lambda epoch: [(Stream("mixed", retain_share=0.3), loss)]))
    assert reads == [(10, 10)]  # 30 % of 31, rounded up
    assert weights_digest(untrained) != weights_digest(original())


def test_kd() -> None:
    def restore(net: Classifier, batch: Batch) -> Tensor:
        return 2 * ce(net, batch) + 3 * kl(net, batch, 2.0)

    run, reads = train_in_doubles(Kd(RECIPE, ce_weight=2.0, kd_weight=3.0, temperature=2.0))
    assert_same(run, descend(run, lambda epoch: [("forget", ascend), ("retain", restore)]))
    assert reads == [(10, 0), (0, 31)]


def test_akd() -> None:
    def restore(net: Classifier, batch: Batch) -> Tensor:
        f, g = net(batch.images).features, answer(batch)[1]
        return 2 * ce(net, batch) + 3 * (f - g).square().sum() / (len(f) * 6)

    method = Akd(RECIPE, ce_weight=2.0, kd_weight=3.0, forget_pass="pseudo-label")
    run, reads = train_in_doubles(method)
    assert_same(run, descend(run, lambda epoch: [("forget", relabel), ("retain", restore)]))
    assert reads == [(10, 0), (0, 31)]


def relations(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of all pairs over their mean, and cosines at j of all triplets i, j, k."""
    rows = F.normalize(rows, dim=1)
    far = torch.stack([(rows[i] - rows[j]).norm() for i, j in combinations(range(len(rows)), 2)])
    unit = F.normalize(rows[:, None] - rows[None], dim=2)  # (i, j): from j to i
    triplets = permutations(range(len(rows)), 3)
    angles = torch.stack([unit[i, j] @ unit[k, j] for i, j, k in triplets])
    return far / far.mean(), angles


def test_rkd() -> None:
    def restore(net: Classifier, batch: Batch) -> Tensor:
        own, other = relations(net(batch.images).features), relations(answer(batch)[1])
        loss = sum(F.smooth_l1_loss(a, b) for a, b in zip(own, other, strict=True))
        return 2 * ce(net, batch) + 3 * loss

    run, reads = train_in_doubles(Rkd(RECIPE, ce_weight=2.0, kd_weight=3.0))
    assert_same(run, descend(run, lambda epoch: [("forget", ascend), ("retain", restore)]))
    assert reads == [(10, 0), (0, 31)]


def test_pl_spkd() -> None:
    def restore(net: Classifier, batch: Batch) -> Tensor:
        grams = [f @ f.T for f in (net(batch.images).features, answer(batch)[1])]
        own, other = (gram / gram.norm(dim=1, keepdim=True) for gram in grams)
        return 2 * ce(net, batch) + 30 * (own - other).square().sum() / len(own) ** 2

    run, reads = train_in_doubles(PlSpkd(RECIPE, ce_weight=2.0, sp_weight=30.0))
    assert_same(run, descend(run, lambda epoch: [("forget", relabel), ("retain", restore)]))
    assert reads == [(10, 0), (0, 31)]
    with pytest.raises(InputError, match="got ascent bounded"):
        PlSpkd(ascent="bounded")


@pytest.mark.parametrize("retain_target", ["argmax", "draw"])
def test_lotus(retain_target: str) -> None:
    method = Lotus(replace(MIXED, batch_size=7), alpha=1.5, retain_target=retain_target)  # type: ignore[arg-type]
    run = run_in_doubles(method)
    right = [(answer(b)[0].argmax(1) == b.labels)[b.forget] for b in run.loader.sweep()]
    tau = torch.exp(1.5 * torch.cat(right).double().mean())

    def loss(net: Classifier, batch: Batch) -> Tensor:
        u = uniform(0, "gumbel", 0, batch.index, 4)
        noisy = answer(batch)[0] - (-(u + 2.0**-54).log()).log()
        best = noisy if retain_target == "draw" else answer(batch)[0]
        target = torch.eye(4, dtype=torch.float64)[best.argmax(1)]
        target[batch.forget] = (noisy[batch.forget] / tau).softmax(1)
        return -(target * net(batch.images).logits.log_softmax(1)).sum(1).mean()

    run, reads = train_in_doubles(method, run)
    assert_same(run, descend(run, lambda epoch: [(Stream("mixed", retain_share=0.3), loss)]))
    assert reads == [(10, 10)]


def test_the_drawn_target_is_not_always_the_best() -> None:
    batches = list(run_in_doubles(Lotus(MIXED)).loader.train("retain", 0))
    for batch in batches:
        u = uniform(0, "gumbel", 0, batch.index, 4)
        logits = answer(batch)[0]
        if (logits.argmax(1) != (logits - (-(u + 2.0**-54).log()).log()).argmax(1)).any():
            return
    raise AssertionError("every draw was the largest")


def test_lotus_cools_and_stops() -> None:
    method = Lotus(alpha=2.0)
    run = run_in_doubles(method)
    state = method.prepare(run)
    seen = state.temperature  # the tensor that a compiled loss reads
    assert method.after_epoch(run, state, Accuracies(0.25, 1.0, None, None)) == "go on"
    assert seen.item() == pytest.approx(2.718281828459045**0.5)
    state.unseen = 0.5
    assert method.after_epoch(run, state, Accuracies(0.495, 1.0, None, None)) == "go on"
    assert method.after_epoch(run, state, Accuracies(0.49, 1.0, None, None)) == "stop"
    run.forget_classes = ()
    with pytest.raises(InputError, match="held-out"):
        method.check(run)


def test_scrub_rewinds_to_the_epoch_that_errs_as_on_unseen_images() -> None:
    method = Scrub(replace(RECIPE, epochs=4), rewind=True)
    run = run_in_doubles(method)
    with pytest.raises(InputError, match="rewind without held-out"):
        method.check(run)
    for classes, unseen, expected in (
        ((2,), (0.45, 0.9), BackTo(1)), ((), (None, 0.9), BackTo(0)), ((2,), (0.1, 0.9), "go on"),
    ):  # fmt: skip
        run.forget_classes = classes
        state = method.prepare(run)
        decisions = []
        for epoch, forget in enumerate((0.95, 0.5, 0.3, 0.2)):
            run.epoch_number = epoch
            decisions.append(method.after_epoch(run, state, Accuracies(forget, 1.0, *unseen)))
        assert decisions == ["go on"] * 3 + [expected]
    assert isinstance(state, ScrubState) and not state.accuracy.isnan().any()


def test_a_rewound_scrub_has_the_weights_of_that_epoch() -> None:
    """Held-out images are the training images: the last epoch's own error is the nearest."""
    method = Scrub(replace(RECIPE, epochs=3, lr=0.2), rewind=True, max_epochs=3)
    run = run_in_doubles(method)
    run.held_out = lambda: run.loader
    run, _ = train_in_doubles(method, run)
    whole, _ = train_in_doubles(replace(method, rewind=False))
    assert weights_digest(run.model) == weights_digest(whole.model)
