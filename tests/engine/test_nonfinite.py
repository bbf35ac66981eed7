"""A loss or gradient that is not finite stops the run, or its step is left out, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from letheon.engine import health
from letheon.engine.checkpoints.run_state import RunState
from letheon.engine.checkpoints.saver import open_saver
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Phase, Run, State
from letheon.engine.models.classifier import Classifier
from letheon.engine.recipe import Recipe
from letheon.engine.runs import stop as stop_module
from letheon.engine.runs.run_folder import LAST_FINITE, STATE, Record
from letheon.engine.runs.stop import Poll
from letheon.errors import InputError, RunFailed
from letheon.loaders.batch import Batch, Loader
from letheon.methods.finetune import Finetune
from letheon.methods.task_vectors import NegMerge
from tests.engine.resume_tools import BreakAt, differing
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
    recipe = replace(recipe, log_every=1)  # a line of a step that was left out has no mean
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


def stopped_within(ranks: Ranks, folder: Path, stops: list[int]) -> list[str]:
    recipe = Recipe(epochs=2, lr=0.02, batch_size=7, on_nonfinite="rollback", log_every=1)
    method = Breaks(recipe)
    return [
        odd
        for stop in stops
        for odd in differing(method, lambda: run_of(method, ranks), folder / str(stop), [stop])
    ]


def test_a_rollback_goes_on_after_a_stop_behind_its_bad_step(tmp_path: Path) -> None:
    """What is saved between the bad step and the rollback leads to the same end."""
    assert stopped_within(Ranks(), tmp_path, [1, 2, 3, 4, 5, 6, 7]) == []


def ranks_stopped_within(ranks: Ranks, folder: Path) -> list[str]:
    return stopped_within(ranks, folder, [3, 5])


def test_two_ranks_go_on_within_a_rollback(tmp_path: Path) -> None:
    assert on_ranks(2, ranks_stopped_within, tmp_path) == [[]] * 2


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


class Nan(Finetune):
    """Fine-tuning whose loss is not finite from step `AT` of the only epoch on."""

    AT = 3

    def phases(self, run: Run, state: State, epoch: int) -> list[Phase]:
        (phase,) = super().phases(run, state, epoch)
        met = iter(range(10**6))

        def loss(net: Classifier, batch: Batch) -> Tensor:
            value = phase.loss(net, batch)
            assert isinstance(value, Tensor)
            return value * (torch.nan if next(met) >= self.AT else 1.0)

        return [replace(phase, loss=loss)]


def stop_early(ranks: Ranks, folder: Path, every: int) -> tuple[str, int, list[int]]:
    """What ends the run, after how many steps, and the positions of the states it leaves."""
    recipe = Recipe(epochs=1, lr=0.02, batch_size=2, batch_norm="frozen")
    method = Nan(recipe)
    run = run_of(method, ranks)
    record = Record(folder, ranks, {})
    poll = BreakAt(ranks, every, 10**6)
    saver = open_saver(record, poll, resume=False)
    with pytest.raises(RunFailed) as caught:
        run_method(method, run, record.log, saver)
    saver.wait()
    states = sorted((folder / STATE).glob("*.json")) if ranks.main else []
    found = [json.loads(path.read_text()) for path in states]
    return str(caught.value), poll.taken, [RunState({}, one).position for one in found]


def on_each(ranks: Ranks, folder: str, every: int) -> tuple[str, int, list[int]]:
    stop_module.SECONDS_BETWEEN_POLLS = 0  # of this process of the pool
    try:
        return stop_early(ranks, Path(folder) / f"{ranks.world}", every)
    finally:
        stop_module.SECONDS_BETWEEN_POLLS = 0.5


@pytest.mark.parametrize("every", [1, 2, 10**6])
@pytest.mark.parametrize("world", [1, 2])
def test_a_broken_run_ends_within_its_pass_and_no_broken_state_is_saved(
    tmp_path: Path, world: int, every: int
) -> None:
    """By the next save, or, where none is due, by the look between two steps."""
    ends = on_ranks(world, on_each, str(tmp_path), every)
    for text, taken, _ in ends:
        assert f"not finite was that of step {Nan.AT + 1} of" in text
        assert Nan.AT < taken <= Nan.AT + 5 < 15
    assert all(position <= Nan.AT for position in ends[0][2])
    assert bool(ends[0][2]) == (every <= Nan.AT)


class Collapse(Finetune):
    """Fine-tuning that ends its second epoch with a network that names one class always."""

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        if run.epoch_number == 1:
            run.model.head.weight.data.zero_()


def collapse_on(ranks: Ranks, folder: str) -> tuple[str, bool]:
    """What ends the run, and whether what it leaves are the weights of its first epoch."""
    recipe = Recipe(epochs=4, lr=0.02, batch_size=7, on_collapse="stop", batch_norm="frozen")
    out = Path(folder) / f"{ranks.world}"
    run = run_of(Collapse(recipe), ranks)
    saver = open_saver(Record(out, ranks, {}), Poll(ranks), resume=False)
    with pytest.raises(RunFailed) as caught:
        run_method(Collapse(recipe), run, saver.record.log, saver)
    saver.fail(caught.value)
    sound = run_of(Finetune(replace(recipe, epochs=1)), ranks)
    run_method(Finetune(sound.recipe), sound)
    kept = load_file(out / LAST_FINITE) if ranks.main else weights(sound)
    return str(caught.value), all(
        torch.equal(kept[name], value) for name, value in weights(sound).items()
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_network_that_collapses_ends_its_run(tmp_path: Path, world: int) -> None:
    for text, equal in on_ranks(world, collapse_on, str(tmp_path)):
        assert "the end of epoch 1: the network collapsed: its accuracy on" in text and equal


@pytest.mark.parametrize("share", [1, 2])
def test_a_collapse_is_said_when_it_happens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    """Where enough images are a small enough share of an epoch: here all are, and half are not."""
    recipe = Recipe(epochs=4, lr=0.02, batch_size=7, batch_norm="frozen")
    run = run_of(Collapse(recipe))
    monkeypatch.setattr(health, "FEWEST", int((~run.forget).sum()))
    monkeypatch.setattr(health, "SHARE", share)
    lines: list[dict[str, Any]] = []
    run_method(Collapse(recipe), run, lambda kind, **facts: lines.append({"kind": kind, **facts}))
    told = [line["text"] for line in lines if line["kind"] == "warning"]
    assert bool(told) == (share == 1)
    assert all("the end of epoch 1: the network collapsed" in text for text in told[:1])
    assert capsys.readouterr().err.count("the network collapsed") == len(told)


def test_the_look_for_a_collapse_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=3, lr=0.02, batch_size=7)
    ends = []
    for fewest in (1, 10**6):
        monkeypatch.setattr(health, "SHARE", 1)
        monkeypatch.setattr(health, "FEWEST", fewest)
        run = run_of(Finetune(recipe))
        run_method(Finetune(recipe), run)
        ends.append(weights(run))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_images_that_cannot_be_looked_at_are_no_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise InputError("got a disk that is gone")

    monkeypatch.setattr(health, "_answers", lost)
    method = Finetune(Recipe(epochs=2, lr=0.02, batch_size=7, on_collapse="stop"))
    run = run_of(method)
    run_method(method, run)  # goes on to its end
    assert "not looked at" in str(health.collapse_warning(run))


@pytest.mark.parametrize(("fewest", "most", "read"), [(1, 1000, 0.1), (20, 1000, 20), (20, 5, 5)])
def test_the_look_at_the_end_reads_a_part(
    fewest: int, most: int, read: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(Finetune(Recipe()))
    images = int((~run.forget).sum())
    seen: list[int] = []
    answers = health._answers

    def count(run: Run, loader: Loader, indices: list[int]) -> object:
        seen.append(len(indices))
        return answers(run, loader, indices)

    monkeypatch.setattr(health, "_answers", count)
    monkeypatch.setattr(health, "FEWEST", fewest)
    monkeypatch.setattr(health, "SAMPLES", most)
    health.collapse_warning(run)
    assert seen == [int(read * images) if read < 1 else read] and images > 20
