"""A loss or gradient that is not finite stops the run, or its step is left out, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Phase, Run, State
from letheon.engine.models.classifier import Classifier
from letheon.engine.recipe import Recipe
from letheon.errors import RunFailed
from letheon.loaders.batch import Batch
from letheon.methods.finetune import Finetune
from letheon.methods.task_vectors import NegMerge
from tests.pool import on_ranks
from tests.world import run_of, weights

Way = Literal["stop", "rollback", "skip"]
BAD = 4
"""A sample whose loss is not a number, in the first epoch."""


class Breaks(Finetune):
    """Fine-tuning whose loss is not finite where it meets one sample."""

    def phases(self, run: Run, state: State, epoch: int) -> list[Phase]:
        (phase,) = super().phases(run, state, epoch)

        def loss(net: Classifier, batch: Batch) -> Tensor:
            value = phase.loss(net, batch)
            assert isinstance(value, Tensor)
            met = (batch.index == BAD).any() & (run.epoch == 0)
            return value * torch.where(met, torch.nan, 1.0)

        return [replace(phase, loss=loss)]


def end_of(
    way: Way, ranks: Ranks, optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
) -> tuple[dict[str, Tensor], list[dict[str, Any]], Run]:
    recipe = Recipe(epochs=2, lr=0.02, batch_size=7, on_nonfinite=way, optimizer=optimizer, ema=0.5)
    method = Breaks(recipe)
    run = run_of(method, ranks)
    lines: list[dict[str, Any]] = []
    run_method(method, run, lambda kind, **numbers: lines.append({"kind": kind, **numbers}))
    return weights(run), lines, run


def sound(values: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_a_step_is_left_out(optimizer: Literal["sgd", "adamw", "lars"]) -> None:
    """Taken back or never taken, the step leaves nothing: both ways end in the same bits."""
    skipped, lines, run = end_of("skip", Ranks(), optimizer)
    repeated, others, _ = end_of("rollback", Ranks(), optimizer)
    assert sound(skipped)
    for name, value in skipped.items():
        assert torch.equal(value, repeated[name]), name
    for found in (lines, others):
        [line] = [line for line in found if line["kind"] == "nonfinite"]
        assert len(line["steps"]) == 1 and line["epoch"] == 0
        assert BAD in line["samples"][0] and len(line["samples"][0]) in (7, 4, 3, 5)
    losses = [
        [line["loss"] for line in found if line["kind"] == "phase"] for found in (lines, others)
    ]
    assert losses[0] == losses[1]
    assert "were left out" in run.warnings[0]


class Learns(NegMerge):
    """Two fine-tunings on the forget set; the last step of the first is not finite."""

    def phases(self, run: Run, state: State, epoch: int) -> list[Phase]:
        (phase,) = super().phases(run, state, epoch)

        def loss(net: Classifier, batch: Batch) -> Tensor:
            value = phase.loss(net, batch)
            assert isinstance(value, Tensor)
            last = list(run.loader.train("forget", 0))[-1].index
            met = torch.equal(batch.index, last) and run.epoch_number == 0
            return value * (torch.nan if met else 1.0)

        return [replace(phase, loss=loss)]


def test_fine_tunings_are_merged_where_their_last_step_is_left_out() -> None:
    ends = []
    for way in ("skip", "rollback"):
        recipe = Recipe(epochs=2, lr=0.02, batch_size=4, on_nonfinite=way)  # type: ignore[arg-type]
        method = Learns(recipe, rates=(1.0, 2.0))
        run = run_of(method)
        run_method(method, run)
        assert "1 steps" in run.warnings[0]
        ends.append(weights(run))
    assert sound(ends[0])
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_stop_names_step_and_samples() -> None:
    with pytest.raises(RunFailed, match=r"not finite was that of step \d of \d+, of samples .*\d"):
        end_of("stop", Ranks())


def on_every_rank(ranks: Ranks) -> list[bool]:
    skipped, lines, _ = end_of("skip", ranks)
    repeated, _, _ = end_of("rollback", ranks)
    [line] = [line for line in lines if line["kind"] == "nonfinite"]
    equal = all(torch.equal(value, repeated[name]) for name, value in skipped.items())
    return [sound(skipped), equal, BAD in line["samples"][0]]


def test_two_ranks_leave_out_the_same_step() -> None:
    assert on_ranks(2, on_every_rank) == [[True] * 3] * 2


def test_a_run_that_diverges_ends() -> None:
    """Rolling back does not go on for ever."""

    class Always(Breaks):
        def phases(self, run: Run, state: State, epoch: int) -> list[Phase]:
            (phase,) = super().phases(run, state, epoch)
            return [
                replace(phase, loss=lambda net, batch: net(batch.images).logits.sum() * torch.nan)
            ]

    recipe = Recipe(epochs=2, lr=0.02, batch_size=3, on_nonfinite="rollback")
    run = run_of(Always(recipe))
    with pytest.raises(RunFailed, match="rolled back"):
        run_method(Always(recipe), run)
