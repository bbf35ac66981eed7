"""One-shot edits of the weights against their definitions, in float64 to 1e-10."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from letheon.engine.loop import run_method
from letheon.engine.method import Method
from letheon.engine.precision import Precision
from letheon.errors import InputError
from letheon.kernels.keyed import normal
from letheon.loaders.batch import Batch
from letheon.methods.esc import Esc
from letheon.methods.fisher import Fisher, GolatkarFisher
from letheon.methods.influence import Influence
from letheon.methods.kodge import Kodge
from letheon.methods.ssd import Lfssd, Ssd
from tests.methods.cases import cases
from tests.methods.double import (
    ONCE,
    THREE,
    end_of,
    flat,
    gradient,
    gradients,
    join,
    same,
    unflat,
    whole,
)
from tests.methods.plain import ce, original, run_in_doubles
from tests.world import FORGOTTEN, run_of


def dampened(forget: Tensor, everything: Tensor, alpha: float, share: float) -> Tensor:
    factor = torch.where(forget > alpha * everything, (share * everything / forget).clamp(max=1), 1)
    return flat(original()) * factor


def test_ssd_is_its_definition() -> None:
    forget, everything = (gradients(part).square().mean(0) for part in ("forget", "all"))
    expected = dampened(forget, everything, 1.2, 0.9)
    same(end_of(Ssd(ONCE, alpha=1.2, dampening=0.9)), expected)


def test_an_alpha_that_no_weight_can_reach_is_said() -> None:
    for alpha, lines in ((4.2, 1), (4.0, 0)):  # 41 samples, 10 of them to forget
        run = run_in_doubles(Ssd(ONCE, alpha=alpha))
        Ssd(ONCE, alpha=alpha).prepare(run)
        assert len(run.warnings) == lines
        assert lines == 0 or torch.equal(flat(run.model), flat(original()))


def test_the_published_importance_is_of_batches() -> None:
    def of_batches(part: str) -> Tensor:
        model, run = original(), run_in_doubles(Ssd(ONCE))
        keep = run.forget if part == "forget" else run.forget | ~run.forget
        batches = list(run.loader.sweep(keep.nonzero().flatten().tolist()))
        squares = [gradient(model, ce(model, b)).square() * len(b.labels) for b in batches]
        return torch.stack(squares).sum(0) / sum(len(b.labels) for b in batches)

    ours = end_of(Ssd(ONCE, alpha=1.2, importance="batch"))
    same(ours, dampened(of_batches("forget"), of_batches("all"), 1.2, 1.0))
    assert not torch.allclose(ours, end_of(Ssd(ONCE, alpha=1.2)))


def test_lfssd_is_its_definition() -> None:
    def norm(model: torch.nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch.images).logits
        return logits.norm() ** 2

    forget, everything = (gradients(part, norm).abs().mean(0) for part in ("forget", "all"))
    same(end_of(Lfssd(ONCE, alpha=1.05)), dampened(forget, everything, 1.05, 1.0))


def noise() -> Tensor:
    tensors = unflat(flat(original()))
    draws = [
        normal(0, "fisher-noise", i, torch.arange(t.numel()), 1) for i, t in enumerate(tensors)
    ]
    return torch.cat(draws)[:, 0]


def test_the_noise_is_normal() -> None:
    draws = normal(3, "test", 1, torch.arange(20_000), 2)
    again = normal(3, "test", 1, torch.tensor([7]), 2)
    assert torch.equal(draws[7:8], again)  # a function of the sample's number
    moments = [draws.mean(0), draws.square().mean(0) - 1, (draws**3).mean(0), draws.prod(1).mean()]
    assert max(float(m.abs().max()) for m in moments) < 0.1  # 4 standard errors of the third
    assert abs(float((draws**4).mean()) - 3) < 0.2


def head() -> Tensor:
    """1 for the weights of the last layer (28 of them), else 0."""
    mask = torch.zeros_like(flat(original()))
    mask[-28:] = 1
    return mask


def test_fisher_is_its_definition() -> None:
    fisher = gradients("retain").square().mean(0)
    size = (1e-5 / fisher).sqrt().clamp(max=0.02) * (1 + 9 * head())
    assert 0 < int((size == 0.02).sum()) < len(size)
    same(end_of(Fisher(ONCE, alpha=1e-5, limit=0.02)), flat(original()) + size * noise())


def test_the_published_fisher_amplifies_the_bias_alone() -> None:
    right, published = end_of(Fisher(ONCE)), end_of(Fisher(ONCE, amplify="bias"))
    ratio = (right - flat(original())) / (published - flat(original()))
    torch.testing.assert_close(ratio[-28:-4], torch.full((24,), 10.0).double())
    torch.testing.assert_close(ratio[-4:], torch.ones(4).double())


def test_golatkars_fisher_is_its_definition() -> None:
    def of(label: int) -> Tensor:
        def loss(model: torch.nn.Module, batch: Batch) -> Tensor:
            log_p: Tensor = model(batch.images).logits.log_softmax(1)[0, label]
            return log_p * log_p.detach().exp().sqrt()

        return gradients("retain", loss).square().mean(0)

    fisher = unflat(torch.stack([of(label) for label in range(4)]).sum(0))
    tops, tens = (1e3, 1e3, 1e3, 1e3, 1e2, 1e2), (1, 10, 10, 10, 10, 10)
    variance = [(1 / (f + 1e-8)).clamp(max=t) for f, t in zip(fisher, tops, strict=True)]
    variance = [v.mean(1, True).expand_as(v) if v.dim() > 1 else v for v in variance]
    size = join([(1e-4 * v * t).sqrt() for v, t in zip(variance, tens, strict=True)])
    start = unflat(flat(original()))
    start[4][FORGOTTEN[0]], start[5][FORGOTTEN[0]] = 0, 0
    same(end_of(GolatkarFisher(ONCE, alpha=1e-4)), join(start) + size * noise())


def influence() -> tuple[Tensor, Tensor]:
    forget, retain = gradients("forget"), gradients("retain")
    share = len(forget) / (len(forget) + len(retain))
    return retain, share * (forget.mean(0) - retain.mean(0))


def test_influence_solves_with_the_whole_fisher_matrix() -> None:
    retain, goal = influence()
    matrix = 0.5 * torch.eye(len(goal)) + retain.T @ retain / len(retain)
    expected = flat(original()) + 3 * torch.linalg.solve(matrix, goal)
    method = Influence(ONCE, alpha=3.0, damping=0.5, tolerance=1e-13, steps=200)
    same(end_of(method), expected)


def test_the_published_recursion_is_no_inverse() -> None:
    retain, goal = influence()
    k, o, count = goal.clone(), retain[0].clone(), len(retain)
    for g in retain[1:]:
        share = (o @ g) / (count + o @ g)
        k -= (k @ g) / (count + o @ g) * o
        o -= share * o
    ours = end_of(Influence(ONCE, solver="published"))
    same(ours, flat(original()) + k)
    exact = end_of(Influence(ONCE)) - flat(original())
    assert torch.cosine_similarity(exact, k, dim=0) < 0.999
    off = k - goal  # all that the other gradients change lies along the first of them
    assert torch.cosine_similarity(off, retain[0], dim=0).abs() > 1 - 1e-9


def projection(rows: Tensor, alpha: float) -> Tensor:
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    share = values**2 / (values**2).sum()
    return vectors.T @ torch.diag(alpha * share / ((alpha - 1) * share + 1)) @ vectors


def test_kodge_is_its_definition() -> None:
    model, inputs = original(), {}
    for part in ("forget", "retain"):
        batch = whole(part)
        patches = torch.nn.functional.unfold(batch.images, 3, padding=1)
        inputs[part] = [patches.mT.flatten(0, 1), model(batch.images).features.detach()]
    start = unflat(flat(model))
    for place, forget, retain in zip((0, 4), inputs["forget"], inputs["retain"], strict=True):
        ours, kept = projection(forget, 5.0), projection(retain, 50.0)
        out = torch.eye(len(ours)) - (torch.eye(len(ours)) - kept) @ ours
        start[place] = (start[place].flatten(1) @ out).view(start[place].shape)
    same(end_of(Kodge(ONCE, alpha_forget=5.0, alpha_retain=50.0)), join(start))


def test_esc_is_its_definition() -> None:
    model = original()
    features = model(whole("forget").images).features.detach()
    vectors = torch.linalg.svd(features).Vh
    start = unflat(flat(model))
    start[4] = start[4] @ vectors[2:].T @ vectors[2:]  # 0.2 of 6 directions, rounded up: 2
    same(end_of(Esc(ONCE, share=0.2)), join(start))


@pytest.mark.parametrize(
    "method",
    [Ssd(alpha=1.2), Lfssd(alpha=1.05), Fisher(), GolatkarFisher(), Influence(), Kodge(), Esc()],
)
def test_single_samples_can_be_asked_for(method: Method) -> None:
    run = run_in_doubles(replace(method, recipe=ONCE))  # type: ignore[type-var]
    run.forget_classes = ()
    method.check(run)
    method.prepare(run)
    assert not torch.equal(flat(run.model), flat(original()))


@pytest.mark.parametrize("name", ["ssd", "lfssd", "fisher", "influence", "sfron", "duck", "scar"])
def test_statistics_serve_a_run_in_bf16(name: str) -> None:
    method = cases(replace(THREE, lr=0.005))[name]
    ends = []
    for dtype in ("fp32", "bf16"):
        run = run_of(method)
        run.precision = Precision(dtype)  # type: ignore[arg-type]
        run_method(method, run)
        ends.append(flat(run.model))
    torch.testing.assert_close(*ends, atol=0.02, rtol=0.1)


def test_an_empty_set_is_refused() -> None:
    for method, mask in ((Fisher(), True), (Influence(), True), (Ssd(), False), (Kodge(), True)):
        run = run_in_doubles(method)
        run.forget = torch.full_like(run.forget, mask)
        with pytest.raises(InputError, match="got no (forget|retain) samples"):
            method.check(run)


# Method -> how often it looks at each forget and each retain image, of 10 and 31.
LOOKS: dict[str, tuple[Method, set[int], set[int]]] = {
    "ssd": (Ssd(ONCE, alpha=1.2), {2}, {1}),
    "lfssd": (Lfssd(ONCE, alpha=1.05), {2}, {1}),
    "fisher": (Fisher(ONCE), {0}, {1}),
    "fisher-golatkar": (GolatkarFisher(ONCE), {0}, {4}),  # once a class
    "influence": (Influence(ONCE, samples=41, steps=1), {1}, {2}),
    "kodge": (Kodge(ONCE, samples=1000), {1}, {1}),
    "esc": (Esc(ONCE, share=0.2), {1}, {0}),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_an_edit_looks_at(name: str) -> None:
    method, forget, retain = LOOKS[name]
    run, looks = run_of(method), torch.zeros(41, dtype=torch.long)
    sweep = run.loader.sweep

    def counted(indices: Any = None, skip: int = 0) -> Iterator[Batch]:
        for batch in sweep(indices, skip):
            looks.index_add_(0, batch.index, torch.ones_like(batch.index))
            yield batch

    run.loader.sweep = counted  # type: ignore[method-assign]
    method.prepare(run)
    found = [set(looks[part].tolist()) for part in (run.forget, ~run.forget)]
    assert found == [forget, retain]
