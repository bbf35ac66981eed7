"""`dtype auto`: by capability; under `tune_step` by a measurement, equal on ranks, recorded."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from letheon.engine import precision as module
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Run
from letheon.engine.precision import LEAST_GAIN, Precision, bf16_gain, say_slower
from letheon.engine.recipe import Recipe
from letheon.engine.runs.run_folder import Record
from letheon.methods.finetune import Finetune
from tests.launch_tools import Scripts
from tests.pool import on_ranks
from tests.world import run_of

CPU = torch.device("cpu")
METHOD = Finetune(Recipe(epochs=1, lr=0.01, batch_size=16))


def run_with(gain: float, ranks: Ranks, patch: pytest.MonkeyPatch) -> Run:
    """A tuned run whose machine measures `gain`, of a network that says it reads 64 pixels."""
    patch.setattr(module, "bf16_gain", lambda: gain)
    patch.setattr(Precision, "autocast", lambda *_: nullcontext())  # bf16 takes a minute on some
    run = run_of(METHOD, ranks)
    run.precision = Precision(tune_step=True)
    run.model.preset = replace(run.model.preset, size=64)
    return run


@pytest.mark.parametrize(
    ("gain", "size", "dtype", "lines"),
    [
        (2.25, 64, "bf16", 1),
        (LEAST_GAIN, 224, "bf16", 1),
        (1.39, 224, "fp32", 1),
        (0.49, 64, "fp32", 1),
        (2.25, 63, "fp32", 0),  # small images are not worth a measurement
    ],
)
def test_a_trial_takes_the_faster_format(
    gain: float, size: int, dtype: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "bf16_gain", lambda: gain)
    precision, line = Precision(tune_step=True).tune(size, Ranks())
    assert precision == Precision(dtype, tune_step=True)  # type: ignore[arg-type]
    assert line.startswith(f"dtype {dtype}: " if lines else "") and bool(line) == bool(lines)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_named_format_is_never_measured(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bf16_gain", lambda: pytest.fail("measured"))
    precision = Precision(dtype, tune_step=True)  # type: ignore[arg-type]
    assert precision.tune(224, Ranks()) == (precision, "")


@pytest.mark.parametrize("size", [8, 224])
def test_without_tuning_nothing_is_measured(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast bf16 is, a CPU trains in fp32: the default is deterministic."""
    run = run_with(100.0, Ranks(), monkeypatch)
    run.model.preset = replace(run.model.preset, size=size)
    run.precision = Precision()
    monkeypatch.setattr(module, "bf16_gain", lambda: pytest.fail("measured"))
    run_method(METHOD, run)
    assert run.precision.dtype == "fp32"
    assert run.notes == []


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_a_cuda_device_takes_bf16_where_it_has_it(
    has_bf16: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU before Ampere has no instructions for it, and torch answers True all the same."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or has_bf16,
    )
    cuda = torch.device("cuda")
    for tune_step in (False, True):
        precision = Precision(tune_step=tune_step).resolve(cuda)
        assert precision == Precision(dtype, tune_step=tune_step)  # type: ignore[arg-type]
    slower = say_slower(Precision("bf16"), cuda)
    assert slower == "" if has_bf16 else slower.endswith("use dtype fp16 or fp32")


@pytest.mark.parametrize(
    ("dtype", "gain", "said"),
    [
        ("bf16", 0.019, "0.019 times as fast as in fp32 on this CPU; use dtype fp32"),
        ("bf16", 0.49, "0.49 times as fast as in fp32 on this CPU; use dtype fp32"),
        ("bf16", 1.0, ""),
        ("fp32", 0.019, ""),
        ("auto", 0.019, ""),
    ],
)
def test_a_format_that_is_slower_here_is_taken_and_said(
    dtype: str, gain: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "bf16_gain", lambda: gain)
    line = say_slower(Precision(dtype), CPU)  # type: ignore[arg-type]
    assert line == (f"dtype bf16: a product in bf16 is {said}" if said else "")


@pytest.mark.parametrize("product", [0.001, 100.0])
def test_a_clear_answer_takes_two_products(product: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 has no instructions a product takes a hundred times as long as one in fp32."""
    taken = []

    def seconds(one: torch.Tensor) -> float:
        taken.append(one.dtype)
        return 1.0 if one.dtype == torch.float32 else product

    monkeypatch.setattr(module, "_seconds", seconds)
    bf16_gain.cache_clear()
    assert bf16_gain() == 1 / product
    bf16_gain.cache_clear()
    assert taken.count(torch.bfloat16) == (2 if product > 1 else taken.count(torch.float32))


def test_an_open_format_computes_in_fp32() -> None:
    """As evaluation does, which tunes nothing."""
    layer = torch.nn.Linear(2, 2)
    open_format = Precision(tune_step=True).resolve(CPU)
    assert open_format.dtype == "auto"
    with open_format.autocast(CPU):
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def tuned_run(ranks: Ranks, gains: list[float]) -> tuple[str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        run = run_with(gains[ranks.rank], ranks, patch)
        run_method(METHOD, run)
        return run.precision.dtype, run.notes


def test_all_ranks_take_what_the_first_one_measured() -> None:
    for gains, dtype in (([2.0, 0.5], "bf16"), ([0.5, 2.0], "fp32")):
        [first, second] = on_ranks(2, tuned_run, gains)
        assert first == second
        assert first[0] == dtype


def test_a_trial_is_printed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(2.25, Ranks(), monkeypatch)
    record = Record(tmp_path, run.ranks, {})
    run_method(METHOD, run, record.log)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [note] = [line["text"] for line in lines if line["kind"] == "note"]
    assert note.startswith("dtype bf16: a product in bf16 is 2.25 times")
    assert {line["dtype"] for line in lines if line["kind"] == "phase"} == {"bf16"}
    assert note in capsys.readouterr().err


def test_measuring_leaves_torch_as_it_was(two_threads: None) -> None:
    state = torch.get_rng_state()
    bf16_gain.cache_clear()
    assert bf16_gain() > 0
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_every_command_that_computes_says_so_once(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "bf16_gain", lambda: 0.02)
    monkeypatch.setattr(Precision, "autocast", lambda *_: nullcontext())  # it would take a minute
    said = say_slower(Precision("bf16"), CPU)
    base, slow = ("--data", "digits", "--device", "cpu"), ("--dtype", "bf16")
    start, request = tmp_path / "start", ("--forget", "class:3")
    commands = {
        "train": ("train", *base, *slow, "--model", "small", "--epochs", 0, "--out", start),
        "mask": ("mask", *base, *slow, *request, "--weights", start, "--densities", 0.5,
                 "--out", tmp_path / "mask.safetensors"),
        "forget": ("forget", *base, *slow, *request, "--weights", start, "--accept-chance",
                   "--out", tmp_path / "forget", "finetune", "--epochs", 0, "+",
                   "grad-ascent", "--epochs", 0),
        "evaluate": ("evaluate", *base, *slow, "--original", start, "--accept-chance",
                     "--runs", tmp_path / "forget" / "finetune"),
    }  # fmt: skip
    for name, words in commands.items():
        ended = scripts(*words)
        assert ended.code == 0, (name, ended.err)
        assert ended.err.count(said) == 1, (name, ended.err)
