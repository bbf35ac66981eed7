"""Saving and loading: bitwise round trips, foreign files, and refusals that say why in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from safetensors.torch import load_file
from torch import nn

from letheon.engine.checkpoints.model_file import load_model, save_model, weights_digest
from letheon.engine.checkpoints.weights_file import write_weights
from letheon.engine.models.classifier import Classifier, build
from letheon.errors import InputError, RunFailed
from tests.engine.files import refusal, saved, state_of

KEY = "layer1.0.conv1.weight"


@pytest.mark.parametrize("to", ["run", "deep/er/model.safetensors"])
def test_a_round_trip_is_bitwise(tmp_path: Path, model: Classifier, to: str) -> None:
    model.preset = dataclasses.replace(model.preset, size=48, mean=(0.1, 0.2, 1 / 3))
    digest = save_model(tmp_path / to, model, {"method": "train"})
    loaded = load_model(tmp_path / to)
    ours, theirs = model.net.state_dict(), loaded.net.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert digest == weights_digest(model) == weights_digest(loaded)
    assert (loaded.name, loaded.preset, loaded.class_names) == (
        model.name, model.preset, model.class_names,
    )  # fmt: skip
    assert not loaded.training
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()) == [".safetensors"]


def test_our_file_loads_in_torchvision(tmp_path: Path) -> None:
    save_model(tmp_path, build("resnet18", 5))
    tv.resnet18(num_classes=5).load_state_dict(load_file(tmp_path / "weights.safetensors"))


def test_the_digest_by_hand() -> None:
    model = build("small", 3)
    total = hashlib.sha256()
    for key in sorted(model.net.state_dict()):
        value = model.net.state_dict()[key]
        kind = "float32" if value.is_floating_point() else "int64"
        total.update(f"{key} torch.{kind} {tuple(value.shape)}\n".encode())
        code = "f" if kind == "float32" else "q"
        total.update(struct.pack(f"<{value.numel()}{code}", *value.flatten().tolist()))
    assert weights_digest(model) == total.hexdigest()
    assert weights_digest(model.to(memory_format=torch.channels_last)) == total.hexdigest()


def test_the_digest_sees_one_bit_a_shape_and_a_key() -> None:
    model = build("small", 3)
    first = weights_digest(model)
    with torch.no_grad():
        model.head.bias[0] = torch.nextafter(model.head.bias[0], torch.tensor(9.0))
    assert weights_digest(model) != first
    buffer = model.net.get_submodule("bn1")
    before = weights_digest(model)
    buffer.get_buffer("num_batches_tracked").add_(1)
    assert weights_digest(model) != before


def test_another_architecture_is_refused_with_the_one_that_fits(
    tmp_path: Path, model: Classifier
) -> None:
    path = saved(tmp_path, state_of(model))
    text = refusal(path, name="resnet32")
    assert "layer1.3.conv1.weight" in text and "resnet32 with 4 classes" in text
    assert text.endswith("its keys fit model resnet20")
    assert "layer1.3.bn1.num_batches_tracked" not in text
    odd = saved(tmp_path, {**state_of(model), "aux.weight": torch.zeros(2)}, "odd.pth")
    text = "does not say its architecture; the nearest is resnet20, with keys 1 unexpected (aux"
    assert text in refusal(odd)
    none = saved(tmp_path, {"aux.weight": torch.zeros(2)}, "none.pth")
    assert "does not say its architecture; give its model; known are small" in refusal(none)
    save_model(tmp_path / "run", model)
    assert "a resnet20; expected small" in refusal(tmp_path / "run", name="small")


def test_another_class_count_is_refused(tmp_path: Path, model: Classifier) -> None:
    path = saved(tmp_path, state_of(model))
    assert "a resnet20 of 4 classes; expected 10" in refusal(path, classes=10, name="resnet20")
    save_model(tmp_path / "run", model)
    assert "of 4 classes; expected 10" in refusal(tmp_path / "run", classes=10)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop(KEY), f"1 missing ({KEY})"),
        (lambda s: s.update({"aux.weight": torch.zeros(2)}), "1 unexpected (aux.weight)"),
        (
            lambda s: s.update({KEY: torch.zeros(16, 16, 1, 1)}),
            f"1 differing ({KEY} (16, 16, 1, 1)",
        ),
        (lambda s: s.update({KEY: s[KEY].to(torch.int8)}), f"{KEY} (16, 16, 3, 3) int8"),
        (lambda s: s.update({"linear.weight": torch.zeros(())}), "linear.weight () not (2, 64)"),
        (lambda s: s[KEY].view(-1)[5].fill_(float("nan")), f"{KEY} holds NaN"),
        (
            lambda s: s["layer3.2.bn2.running_var"].fill_(torch.inf),
            "layer3.2.bn2.running_var holds",
        ),
    ],
    ids=["missing", "extra", "shape", "int8", "scalar", "nan", "inf"],
)
def test_one_wrong_key_is_named(tmp_path: Path, model: Classifier, change: Any, says: str) -> None:
    state = state_of(model)
    change(state)
    assert says in refusal(saved(tmp_path, state), name="resnet20")


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_not_run(tmp_path: Path, model: Classifier, zipped: bool) -> None:
    how = {"_use_new_zipfile_serialization": zipped}
    path = saved(tmp_path, {"state_dict": state_of(model), "x": Trap(tmp_path / "sprung")}, **how)
    assert weights_digest(load_model(path)) == weights_digest(model)
    alone = saved(tmp_path, Trap(tmp_path / "sprung"), "trap.pt", **how)
    assert "a pickled mkdir" in refusal(alone, name="resnet20")
    state = {**state_of(model), KEY: Trap(tmp_path / "sprung")}
    assert f"1 missing ({KEY})" in refusal(saved(tmp_path, state, "in.pt", **how), name="resnet20")
    assert not (tmp_path / "sprung").exists()
    whole = saved(tmp_path, model.plain_net(), "whole.pt", **how)
    assert weights_digest(load_model(whole)) == weights_digest(model)
    one = saved(tmp_path, nn.Linear(2, 2), "one.pt", **how)
    assert "2 unexpected (weight, bias)" in refusal(one, name="resnet20")


@pytest.mark.parametrize("name", ["run/weights.safetensors", "new.pt", "old.th"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(
    tmp_path: Path, model: Classifier, name: str, share: float
) -> None:
    path = tmp_path / name
    if name.startswith("run"):
        save_model(path, model)
    else:
        saved(tmp_path, state_of(model), name, _use_new_zipfile_serialization=name == "new.pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "cut short" in refusal(path, name="resnet20")


def test_a_flipped_bit_in_our_file_is_noticed(tmp_path: Path, model: Classifier) -> None:
    save_model(tmp_path, model)
    path = tmp_path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert "digest" in refusal(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.zeros(2)], "it holds a list"),
        ({}, "an empty dict"),
        (
            {"optimizer": {"lr": 1.0}, "epoch": 3},
            "a dict with optimizer, epoch that are no tensors",
        ),
        (torch.zeros(3), "it holds a Tensor"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: Any, says: str) -> None:
    assert says in refusal(saved(tmp_path, content), name="resnet20")


def test_missing_places_and_later_formats(tmp_path: Path, model: Classifier) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.pt")
    assert "without weights.safetensors" in refusal(tmp_path)
    write_weights(tmp_path / "weights.safetensors", state_of(model), {"letheon_format": "2"})
    assert "format 2" in refusal(tmp_path, name="resnet20")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"preset": '{"size": 32, "colour": 1}'}, "preset cannot be read"),
        ({"preset": "{"}, "preset cannot be read"),
        ({"classes": '["a"]'}, "names 1 classes; expected 4"),
        ({"classes": "["}, "names 0 classes"),
    ],
)
def test_damaged_metadata(
    tmp_path: Path, model: Classifier, facts: dict[str, str], says: str
) -> None:
    path = tmp_path / "weights.safetensors"
    write_weights(path, state_of(model), {"letheon_format": "1", **facts})
    assert says in refusal(path, name="resnet20")


def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, model)
    before = (tmp_path / "weights.safetensors").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        save_model(tmp_path, build("small", 3))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    assert (tmp_path / "weights.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        save_model(tmp_path / "file" / "run", model)
