"""An original that is sure and wrong is refused with its cause; a weak one is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import letheon
from letheon.engine.checkpoints.model_file import load_model, save_model
from letheon.engine.models.classifier import build
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.methods.finetune import Finetune
from tests.launch_tools import Scripts

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


def test_another_preset_is_tried(original: Path, tmp_path: Path) -> None:
    model = load_model(original)
    model.preset = replace(model.preset, mean=(0.99,) * 3, std=(0.02,) * 3)
    with pytest.raises(InputError, match=r"with mean .* it is right on [89]") as caught:
        letheon.forget(model, train="digits", forget=[3], method=SHORT)
    assert caught.value.option == "accept_chance"


def test_a_weak_network_may_forget() -> None:
    """New weights are at chance too, but do not claim to know."""
    for seed in range(3):
        model = build("small", 10, seed)
        model.class_names = tuple(map(str, range(10)))
        letheon.forget(model, train="digits", forget=[3], method=SHORT)
