"""An original that is sure and wrong is refused with its cause; a weak one is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import letheon
from letheon.engine.checkpoints.model_file import load_model, save_model
from letheon.engine.distributed import Ranks
from letheon.engine.models import original_check
from letheon.engine.models.classifier import build
from letheon.engine.models.original_check import Look
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.loaders.batch import Batch, Loader
from letheon.methods.finetune import Finetune
from tests.launch_tools import Scripts
from tests.pool import on_ranks
from tests.world import run_of

SHORT = Finetune(Recipe(epochs=1, lr=1e-3))


def test_the_order_of_the_classes_is_named(
    original: Path, scripts: Scripts, tmp_path: Path
) -> None:
    model = load_model(original)
    with torch.no_grad():  # its class k is what the images call k - 1
        for tensor in model.head.parameters():
            tensor.copy_(tensor.roll(1, 0))
    save_model(tmp_path / "rolled.safetensors", model)
    args = ("--weights", tmp_path / "rolled.safetensors", "--forget", "class:3", "--out")
    ended = scripts("forget", *args, tmp_path / "out", "finetune", "--epochs", 1)
    assert ended.code == 2 and not (tmp_path / "out").exists()
    assert "error: --accept-chance: got an original that is right on" in ended.err
    assert "in another order than the images' (0 as 9, 1 as 0, 2 as 1, ...)" in ended.err
    ended = scripts("forget", *args, tmp_path / "out", "--accept-chance", "finetune", "--epochs", 1)
    assert ended.code == 0, ended.err
    ended = scripts("evaluate", "--original", args[1], "--runs", tmp_path / "out")
    assert ended.code == 2 and "in another order than the images'" in ended.err


def test_another_preset_is_tried(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original_check, "SIZES", (32,))  # the larger ones take seconds
    model = load_model(original)
    model.preset = replace(model.preset, mean=(0.99,) * 3, std=(0.02,) * 3)
    with pytest.raises(InputError, match=r"with mean .* it is right on [89]") as caught:
        letheon.forget(model, train="digits", forget=[3], method=SHORT)
    assert caught.value.option == "accept_chance"


class Failing:
    """A loader that fails on one rank after its images were read."""

    def __init__(self, inner: Loader, fails: bool) -> None:
        self.inner, self.fails = inner, fails

    def sweep(self, rows: list[int]) -> Iterator[Batch]:
        yield from self.inner.sweep(rows)
        if self.fails:
            raise RuntimeError("too small for the network")


def ask_on_rank(ranks: Ranks) -> tuple[str, bool, float]:
    """What the second rank's failure is on each, the model's mode, and what is right afterwards."""
    run = run_of(SHORT, ranks)
    look = Look(run.model.train(), run.loader, run.forget, Precision(), ranks, lambda _: run.loader)
    failing: Any = Failing(run.loader, ranks.rank == 1)
    rows = list(range(41))
    with pytest.raises(InputError) as caught:
        original_check._ask(look, lambda: failing, rows, (InputError, RuntimeError))
    mode = run.model.training
    return str(caught.value), mode, original_check._ask(look, lambda: run.loader, rows).accuracy


def test_a_failure_of_one_rank_ends_a_trial_on_all() -> None:
    """It leaves no other rank in a collective, and the model as it was."""
    one, two = on_ranks(2, ask_on_rank)
    assert one == two and one[:2] == ("too small for the network", True)


def test_a_weak_network_may_forget() -> None:
    """New weights are at chance too, but do not claim to know."""
    for seed in range(3):
        model = build("small", 10, seed)
        model.class_names = tuple(map(str, range(10)))
        letheon.forget(model, train="digits", forget=[3], method=SHORT)
