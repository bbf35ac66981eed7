"""Sums over a set, against their definitions sample by sample; equal on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine import statistics
from letheon.engine.distributed import Ranks
from letheon.engine.recipe import Recipe
from letheon.engine.statistics import (
    class_moments,
    gradient_sum,
    input_covariances,
    outputs_by_index,
    squared_gradient_sum,
)
from letheon.methods.finetune import Finetune, cross_entropy
from tests.pool import on_ranks
from tests.world import network, run_of

RECIPE = Recipe(batch_size=7)
PARTS = ["forget", "retain", "all"]


def samples(part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and numbers of a part, each once, test transform."""
    run = run_of(Finetune(RECIPE))
    batches = list(run.loader.sweep())
    image, label, forget, index = (torch.cat([b[k] for b in batches]) for k in range(4))
    chosen = {"forget": forget, "retain": ~forget, "all": forget | ~forget}[part]
    return image[chosen], label[chosen], index[chosen]


def single_gradients(part: str) -> list[list[Tensor]]:
    model = network().eval()
    found = []
    for image, label in zip(*samples(part)[:2], strict=True):
        loss = F.cross_entropy(model(image[None]).logits, label[None])
        found.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    return found


def work(ranks: Ranks, name: str, *args: Any) -> Any:
    run = run_of(Finetune(RECIPE), ranks)
    return getattr(statistics, name)(run, *args)


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("part", PARTS)
def test_gradients_are_summed_and_squared_by_sample(part: str, world: int) -> None:
    singles = single_gradients(part)
    sums = [torch.stack(grads).sum(0) for grads in zip(*singles, strict=True)]
    squares = [torch.stack(grads).square().sum(0) for grads in zip(*singles, strict=True)]
    for result in on_ranks(world, work, "gradient_sum", part, cross_entropy):
        assert_close(result, sums)
    for result in on_ranks(world, work, "squared_gradient_sum", part, cross_entropy):
        assert_close(result, squares)


def test_the_shortcut_squares_the_mean_of_a_batch() -> None:
    run, model = run_of(Finetune(RECIPE)), network().eval()
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for batch in run.loader.sweep(run.forget.nonzero().flatten().tolist()):
        loss = F.cross_entropy(model(batch.images).logits, batch.labels)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        expected = [e + len(batch.labels) * g**2 for e, g in zip(expected, grads, strict=True)]
    assert_close(squared_gradient_sum(run, "forget", cross_entropy, "batch"), expected)


@pytest.mark.parametrize("world", [1, 2])
def test_moments_of_the_classes(world: int) -> None:
    images, labels, _ = samples("retain")
    features = network().eval()(images).features.detach().double()
    for count, mean, variance in on_ranks(world, work, "class_moments", "retain"):
        assert count.tolist() == torch.bincount(labels, minlength=4).tolist()
        for c in (0, 1, 3):
            own = features[labels == c]
            torch.testing.assert_close(mean[c], own.mean(0), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(variance[c], own.var(0, correction=0), atol=1e-6, rtol=1e-5)
        assert not mean[2].any() and not variance[2].any()


@pytest.mark.parametrize("world", [1, 2])
def test_covariances_of_what_layers_are_given(world: int) -> None:
    images, _, _ = samples("forget")
    padded = F.pad(images.double(), (1, 1, 1, 1))
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # (N, 3, 8, 8, 3, 3)
    rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    features = network().eval()(images).features.detach().double()
    for result in on_ranks(world, work, "input_covariances", "forget", ["0", "5"]):
        torch.testing.assert_close(result["0"], rows.T @ rows, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(result["5"], features.T @ features, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("world", [1, 3])
def test_outputs_come_by_number(world: int) -> None:
    images, classes, numbers = samples("retain")
    truth = network().eval()(images)
    shares = on_ranks(world, work, "outputs_by_index", "retain")
    assert max(len(index) for index, *_ in shares) == -(-len(numbers) // world)
    index, logits, features, labels = (torch.cat(column) for column in zip(*shares, strict=True))
    assert index.tolist() == sorted(numbers.tolist())
    assert labels.tolist() == classes[numbers.argsort()].tolist()
    assert_close([logits, features], [truth.logits.detach(), truth.features.detach()])


def test_runs_of_a_call_compute_it_once() -> None:
    one, two = run_of(Finetune(RECIPE)), run_of(Finetune(RECIPE))
    two.loader = one.loader
    one.shared = two.shared = {}
    first = gradient_sum(one, "forget", cross_entropy)
    assert gradient_sum(two, "forget", cross_entropy) is first
    assert gradient_sum(two, "retain", cross_entropy) is not first
    with torch.no_grad():
        two.parameters[0].view(-1)[0] += 1e-3
    assert gradient_sum(two, "forget", cross_entropy) is not first
    one.forget = ~one.forget
    assert gradient_sum(one, "forget", cross_entropy) is not first
    assert len(one.shared) == 4


def test_the_model_is_left_as_it_was() -> None:
    run = run_of(Finetune(RECIPE))
    run.model.train()
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    gradient_sum(run, "all", cross_entropy)
    squared_gradient_sum(run, "all", cross_entropy)
    class_moments(run, "all")
    input_covariances(run, "all", ["0"])
    outputs_by_index(run, "all")
    assert run.model.training and all(p.grad is None for p in run.parameters)
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
