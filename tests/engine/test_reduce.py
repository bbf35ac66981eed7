"""Gradients joined in buckets or in one buffer, and batches computed in parts: the same steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from letheon.engine import gradient_sync_trial, step
from letheon.engine.distributed import Ranks
from letheon.engine.gradient_sync import Flat
from letheon.engine.loop import run_method
from letheon.engine.method import Method
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.loaders.batch import Batch
from letheon.loaders.micro_batches import pieces
from letheon.methods.finetune import Finetune
from letheon.methods.random_label import RandomLabel
from letheon.methods.salun import SalUn
from letheon.methods.sfron import Sfron
from letheon.methods.spkd import Spkd
from tests.pool import on_ranks
from tests.world import run_of, weights

RECIPE = Recipe(epochs=2, lr=0.05, batch_size=8, batch_norm="frozen")
TOLERANCE = 2e-5  # float32 sums in another order, as in tests/methods/test_ranks.py


def end(ranks: Ranks, method: Method, precision: Precision) -> dict[str, torch.Tensor]:
    run = run_of(method, ranks)
    run.precision = precision
    run_method(method, run)
    return weights(run)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], by: float) -> None:
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=by, rtol=0, msg=key)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("order", ["mixed", "paired"])
def test_accumulated_micro_batches_are_the_large_batch(count: int, order: str) -> None:
    whole = RandomLabel(RECIPE, order=order, alpha=0.5)  # type: ignore[arg-type]
    parts = replace(whole, recipe=replace(RECIPE, grad_accum_steps=count))
    alone = end(Ranks(), whole, Precision("fp32"))
    assert_close(end(Ranks(), parts, Precision("fp32")), alone, TOLERANCE)
    assert_close(end(Ranks(), parts, Precision("fp32", reduce="flat")), alone, TOLERANCE)


@pytest.mark.parametrize("reduce", ["ddp", "flat"])
def test_accumulation_on_ranks_is_the_large_batch_on_one(reduce: str) -> None:
    precision = Precision("fp32", reduce=reduce)  # type: ignore[arg-type]
    alone = end(Ranks(), RandomLabel(RECIPE), Precision("fp32"))
    # 8 rows on 3 ranks in 3 parts: one rank has fewer rows than parts.
    for result in on_ranks(3, end, RandomLabel(replace(RECIPE, grad_accum_steps=3)), precision):
        assert_close(result, alone, TOLERANCE)


@pytest.mark.parametrize("reduce", ["ddp", "flat"])
def test_bf16_on_the_wire_rounds_and_keeps_the_ranks_equal(reduce: str) -> None:
    precision = Precision("fp32", reduce=reduce, wire="bf16")  # type: ignore[arg-type]
    alone = end(Ranks(), Finetune(RECIPE), Precision("fp32"))
    results = on_ranks(2, end, Finetune(RECIPE), precision)
    assert all(torch.equal(results[0][key], results[1][key]) for key in alone)
    assert_close(results[0], alone, 5e-3)  # gradients to three digits, 8 steps at rate 0.05
    assert any((results[0][key] - alone[key]).abs().max() > TOLERANCE for key in alone)


def test_pieces_hold_each_row_once() -> None:
    rows = torch.arange(7)
    batch = Batch(torch.randn(7, 3, 2, 2), rows, rows > 3, rows * 10, 20)
    for count in (1, 2, 5, 7, 9):
        parts = list(pieces(batch, count))
        assert len(parts) == min(count, 7)
        assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
        assert sorted(torch.cat([part.index for part, _ in parts]).tolist()) == batch.index.tolist()
        for part, _ in parts:
            assert torch.equal(part.images, batch.images[part.labels])
            assert part.total == 20


def test_gradients_of_the_flat_buffer_stay_views() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model.to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat = Flat(model, list(model.parameters()), Ranks())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for _ in range(2):
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        for parameter, view in zip(
            model.parameters(), flat.layout.views(flat.gradients), strict=True
        ):
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == view.data_ptr()
            assert parameter.grad.stride() == parameter.stride()
        assert flat.gradients.abs().sum() > 0
        flat.clear()
        assert flat.gradients.abs().sum() == 0
    flat.weights.zero_()
    assert not any(parameter.any() for parameter in model.parameters())


def test_auto_is_buckets_but_one_buffer_with_compile() -> None:
    assert Precision().reduction(1) == "none"
    assert Precision().reduction(2) == "ddp"
    assert Precision(compile="default").reduction(1) == "none"
    assert Precision(compile="default").reduction(2) == "flat"
    assert Precision(reduce="flat").reduction(1) == "flat"
    with pytest.raises(InputError, match="reduce ddp"):
        Precision(compile="max", reduce="ddp")


def choice(ranks: Ranks, seconds: dict[str, list[float]]) -> tuple[str, str]:
    run = run_of(Finetune(RECIPE), ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_sync_trial, "_seconds", lambda _, way: seconds[way][ranks.rank])
        return gradient_sync_trial.choose_reduction(run)


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        ({"ddp": [1.0, 5.0], "flat": [2.0, 3.0]}, "flat"),  # the slowest rank counts
        ({"ddp": [2.0, 1.0], "flat": [1.0, 4.0]}, "ddp"),
        ({"ddp": [1.0, 1.0], "flat": [1.0, 1.0]}, "ddp"),
    ],
)
def test_all_ranks_take_what_is_quicker_on_the_slowest(
    seconds: dict[str, list[float]], way: str
) -> None:
    answers = on_ranks(2, choice, seconds)
    assert answers[0] == answers[1]
    assert answers[0][0] == way and f"reduce {way}:" in answers[0][1]


def run_with_trial(ranks: Ranks, epochs: int) -> tuple[dict[str, torch.Tensor], list[str], bool]:
    """A run that chooses for itself; whether the trial left weights and random numbers alone."""
    method = Finetune(replace(RECIPE, epochs=epochs))
    run = run_of(method, ranks)
    run.precision = Precision("fp32", tune_step=True)
    before, generator = weights(run), torch.get_rng_state()
    gradient_sync_trial.choose_reduction(run)
    alone = all(torch.equal(value, before[key]) for key, value in weights(run).items())
    alone &= torch.equal(generator, torch.get_rng_state())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_sync_trial, "LEAST_STEPS", 8)  # 31 images to retain, batches of 8
        run_method(method, run)
    return weights(run), run.notes, alone


def test_a_trial_changes_nothing_and_is_noted() -> None:
    alone = end(Ranks(), Finetune(RECIPE), Precision("fp32"))
    for result, notes, untouched in on_ranks(2, run_with_trial, 2):
        assert untouched
        assert len(notes) == 1 and notes[0].startswith("reduce ")
        assert_close(result, alone, TOLERANCE)
    assert all(not notes for _, notes, _ in on_ranks(2, run_with_trial, 1))  # four steps: no trial
    assert all(not notes for notes in on_ranks(2, notes_without_tuning))


def notes_without_tuning(ranks: Ranks) -> list[str]:
    """The default is deterministic: no trial however long the run."""
    method = Finetune(replace(RECIPE, epochs=2))
    run = run_of(method, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_sync_trial, "LEAST_STEPS", 0)
        patch.setattr(gradient_sync_trial, "_seconds", lambda *_: pytest.fail("a trial"))
        run_method(method, run)
    return run.notes


def partly_frozen(ranks: Ranks, method: Method) -> tuple[dict[str, torch.Tensor], bool | None]:
    """With the first layer frozen; whether DDP was told that its graph is static."""
    run = run_of(method, ranks)
    run.precision = Precision("fp32", reduce="ddp" if ranks.world > 1 else "auto")
    for parameter in run.model.net[0].parameters():
        parameter.requires_grad_(False)
    ways: list[bool | None] = []
    make = step.Buckets.__init__

    def seen(self: step.Buckets, *args: object) -> None:
        make(self, *args)  # type: ignore[arg-type]
        ways.append(self.ddp.static_graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.Buckets, "__init__", seen)
        run_method(method, run)
    return weights(run), ways[0] if ways else None


@pytest.mark.parametrize(
    ("method", "static"),
    [
        (SalUn(RandomLabel(RECIPE), density=0.3), True),
        (SalUn(RandomLabel(RECIPE, order="sequential"), density=0.3), False),
        (RandomLabel(replace(RECIPE, grad_accum_steps=2)), False),
    ],
)
def test_a_static_graph_with_frozen_weights_and_masks(method: Method, static: bool) -> None:
    alone, _ = partly_frozen(Ranks(), method)
    start = weights(run_of(method))
    assert torch.equal(alone["0.weight"], start["0.weight"])
    assert not torch.equal(alone["5.weight"], start["5.weight"])
    for result, told in on_ranks(3, partly_frozen, method):
        assert told is static
        assert_close(result, alone, TOLERANCE)


def test_batch_norm_over_ranks_is_refused_in_a_compiled_graph() -> None:
    run = run_of(Finetune(replace(RECIPE, batch_norm="sync")))
    two = Ranks(world=2)
    with pytest.raises(InputError, match="batch-norm sync with compile max"):
        replace(run, ranks=two, precision=Precision(compile="max"))
    replace(run, ranks=two)  # not compiled
    replace(run, precision=Precision(compile="max"))  # one rank


def test_similarities_of_a_whole_batch_refuse_micro_batches() -> None:
    method = Spkd(replace(RECIPE, grad_accum_steps=2))
    with pytest.raises(InputError, match="gram local"):
        method.check(run_of(method))
    local = replace(method, gram="local")
    local.check(run_of(local))


def test_a_collective_loss_refuses_batches_of_fewer_samples_than_ranks() -> None:
    """Eleven ranks: the retain set has 31 samples, the forget set ten."""
    method = Sfron(replace(RECIPE, batch_size=32))
    many = replace(run_of(method), ranks=Ranks(0, 11))
    with pytest.raises(InputError, match="got a forget batch of fewer samples than"):
        method.check(many)
