"""Checkpoints from elsewhere: wrappers, prefixes, formats and a normalisation of their own."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from letheon.engine.checkpoints.key_names import strip_prefixes
from letheon.engine.checkpoints.model_file import load_model, weights_digest
from letheon.engine.models.classifier import Classifier, build
from letheon.loaders.preset import Preset
from tests.engine.files import refusal, saved, state_of

KEY = "layer1.0.conv1.weight"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "best": 0.5},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {"model_state_dict": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: OrderedDict((f"module.{k}", v) for k, v in s.items()),
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}},
        lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
    ],
    ids=[
        "plain",
        "state_dict",
        "model",
        "model_state_dict",
        "two",
        "module",
        "compiled",
        "net",
        "part",
    ],
)
def test_wrappers_and_prefixes(tmp_path: Path, model: Classifier, wrap: Any) -> None:
    path = saved(tmp_path, wrap(state_of(model)))
    loaded = load_model(path, classes=4, name="resnet20")
    assert weights_digest(loaded) == weights_digest(model)
    assert loaded.class_names is None


def test_formats(tmp_path: Path, model: Classifier) -> None:
    old = saved(tmp_path, state_of(model), "old.th", _use_new_zipfile_serialization=False)
    foreign = tmp_path / "foreign.safetensors"
    save_file(state_of(model), foreign, {"architecture": "their own word", "classes": "?"})
    for path in (old, foreign):
        loaded = load_model(path, name="resnet20")
        assert (weights_digest(loaded), loaded.classes) == (weights_digest(model), 4)


def test_counters_may_be_missing_and_halves_are_widened(tmp_path: Path, model: Classifier) -> None:
    state = {k: v.half() for k, v in state_of(model).items() if "num_batches" not in k}
    loaded = load_model(saved(tmp_path, state), name="resnet20").net.state_dict()
    assert torch.equal(loaded[KEY], state[KEY].float())
    assert loaded["bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("prefix", "mean", "std"),
    [
        ("", "normalize.mean", "normalize.std"),
        ("module.", "module.normalize.mean", "module.normalize.std"),
        ("model.", "normalize.mean", "normalize.std"),
        ("1.", "0.mean", "0.std"),
    ],
)
def test_a_normalize_module_becomes_the_preset(
    tmp_path: Path, model: Classifier, prefix: str, mean: str, std: str
) -> None:
    state = {prefix + key: value for key, value in state_of(model).items()}
    state[mean] = torch.tensor([0.4, 0.5, 0.6])
    state[std] = torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1)
    path = saved(tmp_path, {"state_dict": state})
    plain = build("resnet20", 4).preset
    expected = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    loaded = load_model(path, name="resnet20")
    assert loaded.preset == dataclasses.replace(plain, **expected)
    assert weights_digest(loaded) == weights_digest(model)
    asked = Preset(size=64)
    assert load_model(path, name="resnet20", preset=asked).preset == dataclasses.replace(
        asked, **expected
    )


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], "divide them by 255"),
        ([0.5, 0.5, 0.5], [0.2, 0.0, 0.2], "positive"),
        ([0.5], [0.2], "3 numbers"),
        ([0.5, 0.5, 0.5], None, "one mean and one std"),
        ([0.5, float("nan"), 0.5], [0.2, 0.2, 0.2], "mean"),
        ([0.5, 0.5, 0.5], [0.2, float("nan"), 0.2], "positive"),
        ([0.5, 0.5, 0.5], [0.2, float("inf"), 0.2], "positive"),
    ],
)
def test_a_doubtful_normalize_module_is_refused(
    tmp_path: Path, model: Classifier, mean: list[float], std: list[float] | None, says: str
) -> None:
    state = state_of(model) | {"normalize.mean": torch.tensor(mean)}
    if std is not None:
        state["normalize.std"] = torch.tensor(std)
    assert says in refusal(saved(tmp_path, state), name="resnet20")


def test_prefixes_are_dropped_only_where_all_share_them() -> None:
    zero = torch.zeros(1)
    assert list(strip_prefixes({"a.b.x": zero, "a.c.y": zero})) == ["b.x", "c.y"]
    assert list(strip_prefixes({"a.x": zero, "b.y": zero})) == ["a.x", "b.y"]
    assert list(strip_prefixes({"a.x": zero, "a": zero})) == ["a.x", "a"]
    assert list(strip_prefixes({"a.x": zero})) == ["a.x"]
