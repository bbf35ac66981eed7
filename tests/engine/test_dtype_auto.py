"""`--dtype auto` on a CPU: by what was measured, the same on all ranks, told and recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from letheon.engine import precision as module
from letheon.engine.distributed import Ranks
from letheon.engine.gradients import summed_gradients
from letheon.engine.loop import run_method
from letheon.engine.method import Run
from letheon.engine.precision import LEAST_GAIN, Precision, bf16_gain
from letheon.engine.recipe import Recipe
from letheon.engine.runs.run_folder import Record
from letheon.methods.finetune import Finetune
from tests.pool import on_ranks
from tests.world import run_of

CPU = torch.device("cpu")
METHOD = Finetune(Recipe(epochs=1, lr=0.01, batch_size=16))


def run_with(gain: float, ranks: Ranks, patch: pytest.MonkeyPatch, size: int = 64) -> Run:
    """A run whose machine would measure `gain`, of a network that says it reads `size` pixels."""
    patch.setattr(module, "bf16_gain", lambda: gain)
    run = run_of(METHOD, ranks)
    run.precision = Precision().resolve(ranks.device)
    run.model.preset = replace(run.model.preset, size=size)
    return run


@pytest.mark.parametrize(
    ("gain", "size", "dtype", "told"),
    [
        (2.25, 64, "bf16", 1),
        (LEAST_GAIN, 224, "bf16", 1),
        (1.39, 224, "fp32", 1),
        (0.49, 64, "fp32", 1),
        (2.25, 63, "fp32", 0),  # small images are not worth asking for
    ],
)
def test_the_faster_one_is_taken(
    gain: float, size: int, dtype: str, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(gain, Ranks(), monkeypatch, size)
    assert run.precision.dtype == "auto"
    run.decide_dtype()
    run.decide_dtype()
    assert run.precision.dtype == dtype
    assert [line[:10] for line in run.notes] == [f"dtype {dtype}"] * told


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_named_one_is_taken_as_it_is(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bf16_gain", lambda: pytest.fail("measured"))
    known = Precision(dtype)  # type: ignore[arg-type]
    assert known.tune(224, Ranks()) == (known, "")


def test_undecided_computes_in_fp32() -> None:
    """As evaluation does, which asks for no decision."""
    layer = torch.nn.Linear(2, 2)
    with Precision().resolve(CPU).autocast(CPU):
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def decided(ranks: Ranks, gains: list[float]) -> tuple[str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        run = run_with(gains[ranks.rank], ranks, patch)
        run.decide_dtype()
        return run.precision.dtype, run.notes


def test_all_ranks_take_what_the_first_one_measured() -> None:
    for gains, dtype in (([2.0, 0.5], "bf16"), ([0.5, 2.0], "fp32")):
        [first, second] = on_ranks(2, decided, gains)
        assert first == second
        assert first[0] == dtype


def test_the_decision_is_told_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(2.25, Ranks(), monkeypatch)
    record = Record(tmp_path, run.ranks, {})
    run_method(METHOD, run, record.log)
    record.finish(method="Finetune")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [note] = [line["text"] for line in lines if line["kind"] == "note"]
    assert note.startswith("dtype bf16: a product in bf16 is 2.25 times")
    assert {line["dtype"] for line in lines if line["kind"] == "phase"} == {"bf16"}
    assert note in capsys.readouterr().err
    ended = json.loads((tmp_path / "run.json").read_text())
    assert ended == {"dtype": "bf16", "method": "Finetune"}


def test_saliency_is_summed_in_the_runs_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask made by itself is the mask that the run would make."""
    run = run_with(2.25, Ranks(), monkeypatch)
    summed_gradients(run, "forget", lambda net, batch: net(batch.images).logits.float().mean())
    assert run.precision.dtype == "bf16"


def test_measuring_leaves_torch_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    bf16_gain.cache_clear()
    assert bf16_gain(32, 1) > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
