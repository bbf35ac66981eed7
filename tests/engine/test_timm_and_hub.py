"""Networks of timm and transformers themselves, where these are installed: the same outputs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from letheon.engine.checkpoints.model_file import load_model, save_model
from letheon.engine.models import classifier, timm_model
from letheon.engine.models.classifier import build, preset_of
from letheon.engine.models.initial import initial_copy
from letheon.errors import InputError
from letheon.loaders.preset import Preset
from tests.engine.files import saved

needs_timm = pytest.mark.skipif(not timm_model.is_installed(), reason="timm is not installed")
X = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
OURS = {
    "resnet18": "resnet18",
    "vit_tiny_patch16_224": "vit_tiny_16",
    "swin_tiny_patch4_window7_224": "swin_t",
    "convnext_tiny": "convnext_tiny",
}


def test_a_network_of_timm_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not reset layer by layer: timm's own start is another, and not every layer can be reset."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((3,), 0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) * self.gain

    def network(name: str, classes: int, size: int) -> nn.Module:
        return nn.Sequential(Scale(), nn.Linear(3, classes))

    monkeypatch.setattr(classifier, "timm_network", network)
    monkeypatch.setattr(classifier, "preset_of_timm", lambda name: Preset(size=8, resize_to=8))
    model = build("timm:x", 4, 0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(1)
    fresh, expected = initial_copy(model, 3), build("timm:x", 4, 3)
    for key, value in expected.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)


def shake(net: nn.Module) -> nn.Module:
    """New weights large enough that each matters, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def same(path: Path, name: str, expected: torch.Tensor) -> None:
    loaded = load_model(path, tell=lambda line: None)
    assert (loaded.name, loaded.classes) == (name, 4)
    with torch.no_grad():
        logits = loaded(X).logits
    assert expected.std() > 0.05 and torch.allclose(logits, expected, atol=2e-3, rtol=2e-3)


@needs_timm
@pytest.mark.parametrize("kind", OURS)
def test_timms_own_keys_compute_the_same(tmp_path: Path, kind: str) -> None:
    import timm

    net = shake(timm.create_model(kind, num_classes=4))
    with torch.no_grad():
        expected = net(X)
    same(saved(tmp_path, {"state_dict": net.state_dict()}), OURS[kind], expected)


@needs_timm
def test_a_network_of_timm_by_name(tmp_path: Path) -> None:
    import timm

    for kind in ("regnety_002", "vit_tiny_patch16_224", "mobilenetv3_small_100"):
        net = timm.create_model(kind, num_classes=4).eval()
        cfg = net.pretrained_cfg
        loaded = load_model(saved(tmp_path, net.state_dict()), name=f"timm:{kind}")
        assert loaded.preset.mean == tuple(cfg["mean"]) and loaded.preset.std == tuple(cfg["std"])
        assert loaded.preset.resize_to == int(cfg["input_size"][-1] / cfg["crop_pct"])
        assert loaded.preset.interpolation == cfg["interpolation"]
        with torch.no_grad():
            assert torch.equal(loaded(X).logits, net(X))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    page = {"architecture": kind, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "config.json").write_text(json.dumps(page))
    folder = load_model(tmp_path)
    assert folder.name == f"timm:{kind}" and folder.preset.mean == (0.1, 0.2, 0.3)
    save_model(tmp_path / "run", loaded)
    again = load_model(tmp_path / "run")
    assert again.name == "timm:mobilenetv3_small_100" and again.preset == loaded.preset
    first, second = (build("timm:resnet10t", 4, seed=3).net.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(InputError, match="did you mean timm:"):
        preset_of("timm:resnet5")


def test_without_timm_the_mend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match="timm is not installed; expected it, .*; pip install 'timm>="
    ) as caught:
        preset_of("timm:resnet18")
    assert caught.value.option == "model"


TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": (
        "vit_tiny_16",
        {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    ),
    "Swin": ("swin_t", {}),
    "ConvNext": ("convnext_tiny", {}),
    "ResNet": ("resnet50", {}),
}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
@pytest.mark.parametrize("kind", HUB)
def test_folders_that_transformers_writes(tmp_path: Path, kind: str) -> None:
    import transformers

    name, options = HUB[kind]
    config = getattr(transformers, f"{kind}Config")(num_labels=4, **options)
    net = shake(getattr(transformers, f"{kind}ForImageClassification")(config))
    net.save_pretrained(tmp_path / "hub")
    with torch.no_grad():
        expected = net(X).logits
    same(tmp_path / "hub", name, expected)
    torch.save(net.state_dict(), tmp_path / "memory.pt")  # by the keys it has in memory
    same(tmp_path / "memory.pt", name, expected)
