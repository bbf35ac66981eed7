"""The forms a model is written in: each is read back, bitwise, and says what it should."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch

from letheon.engine.checkpoints.key_names import restore_names, translate
from letheon.engine.checkpoints.model_file import load_model, save_model, weights_digest
from letheon.engine.models.classifier import Classifier, build
from letheon.errors import InputError
from letheon.launch.export import forms, hub
from letheon.loaders.forget_request import Request
from letheon.loaders.preset import Preset
from tests.engine import foreign_networks
from tests.launch_tools import Scripts


def model(name: str, size: int | None = None) -> Classifier:
    made = build(name, 4, seed=3, preset=None if size is None else Preset(size, resize_to=232))
    made.class_names = ("a", "b\n## c", "<i>", "d")
    return made


def header(file: Path) -> dict[str, object]:
    data = file.read_bytes()
    return dict(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))


def test_plain_files_of_a_run(tmp_path: Path, scripts: Scripts) -> None:
    run = tmp_path / "run"
    digest = save_model(run, model("resnet18"))
    for form, name in (
        ("safetensors", "a.safetensors"),
        ("torchvision", "b.pth"),
        ("timm", "c.pt"),
    ):
        ended = scripts("export", run, "--form", form, "--out", tmp_path / name)
        assert ended.code == 0, ended.err
    loaded = load_model(tmp_path / "a.safetensors", name="resnet18", tell=str)
    assert weights_digest(loaded) == digest
    assert header(tmp_path / "a.safetensors")["__metadata__"] == {"format": "pt"}
    from torchvision.models import resnet18

    state = torch.load(tmp_path / "b.pth", weights_only=True)
    assert type(state) is dict
    resnet18(num_classes=4).load_state_dict(state, strict=True)


def test_a_folder_for_the_hub(tmp_path: Path, scripts: Scripts) -> None:
    run, out = tmp_path / "run", tmp_path / "hub"
    first = model("resnet18", size=64)
    first.requests = (
        Request(
            "class:1",
            (1,),
            None,
            "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b",
        ),
    )
    digest = save_model(run, first)
    (run / "run.json").write_text('{"method": "salun", "images": {"train": 7}}')
    (run / "settings.json").write_text('{"seed": 5, "weights": "/secret/place"}')
    assert scripts("export", run, "--form", "huggingface", "--out", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(hub.FILES)
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "resnet18" and config["num_classes"] == 4
    assert config["label_names"] == ["a", "b\n## c", "<i>", "d"]
    loaded = load_model(out, tell=str)
    assert weights_digest(loaded) == digest
    seen, was = loaded.preset, first.preset
    assert (seen.size, seen.resize_to, seen.mean, seen.resize) == (64, 232, was.mean, "short")
    card = (out / "README.md").read_text()
    assert "library_name: timm" in card and '"method": "salun"' in card and digest in card
    assert "not that the data have been forgotten" in card and "machine-unlearning" in card
    assert "secret" not in card and "## c" not in card
    refused = scripts("export", run, "--form", "huggingface", "--out", out)
    assert refused.code == 2 and "--out: got" in refused.err
    again = scripts("export", run, "--form", "huggingface", "--out", out, "--overwrite")
    assert again.code == 0


def test_a_network_that_only_letheon_builds(tmp_path: Path, scripts: Scripts) -> None:
    run, out = tmp_path / "run", tmp_path / "hub"
    digest = save_model(run, model("small"))
    assert scripts("export", run, "--form", "huggingface", "--out", out).code == 0
    loaded = load_model(out, tell=str)
    assert (loaded.name, weights_digest(loaded), loaded.preset.size) == ("small", digest, 16)
    card = (out / "README.md").read_text()
    assert "library_name: letheon" in card and "machine-unlearning" not in card
    for form, file in (("torchvision", "a.pth"), ("timm", "a.pth"), ("safetensors", "a.bin")):
        refused = scripts("export", run, "--form", form, "--out", tmp_path / file)
        assert refused.code == 2 and refused.err.startswith("error: --"), refused.err
        assert not (tmp_path / file).exists()


@pytest.mark.parametrize("name", ["vit_tiny_16", "convnext_tiny", "swin_t"])
def test_keys_of_timm_are_the_ones_we_read(name: str) -> None:
    """`restore_names` undoes `translate`: what it gives is read back to the same weights."""
    ours = forms.plain_state(model(name))
    if name == "vit_tiny_16":
        theirs = foreign_networks.timm_vit(224)
    elif name == "convnext_tiny":
        theirs = foreign_networks.timm_convnext(ours)
    else:
        theirs = foreign_networks.timm_swin(ours)
    foreign = {key: torch.empty(value.shape, device="meta") for key, value in theirs.items()}
    named = restore_names(ours, foreign)
    assert {k: v.shape for k, v in named.items()} == {
        k: v.shape for k, v in theirs.items() if k in named
    }
    back = translate(dict(named))
    for key, value in ours.items():
        if not key.endswith("relative_position_index"):
            found = back[key]
            assert isinstance(found, torch.Tensor) and torch.equal(found, value), key
    with pytest.raises(InputError, match="which one network lacks"):
        restore_names({**ours, "extra": torch.zeros(1)}, foreign)


def test_presets_that_timm_can_say() -> None:
    for size, resize_to in ((224, 232), (224, 236), (224, 256), (299, 342), (96, 97)):
        said = hub._images(Preset(size, resize_to=resize_to))
        assert int(size / said["crop_pct"]) == resize_to
    with pytest.raises(InputError, match="crops before it resizes"):
        hub._images(Preset(224, resize="crop-square"))


def missing(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(missing("timm")), reason="timm is not installed")
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_16"])
def test_timm_opens_the_folder(tmp_path: Path, name: str) -> None:
    import timm

    first = model(name).eval()
    hub.write_folder(tmp_path / "hub", first, tmp_path)
    net = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(net(images), first(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    bool(missing("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    assert "differ by at most" in forms.write_onnx(tmp_path / "a.onnx", model("small"))


@pytest.mark.skipif(not missing("onnx"), reason="onnx is installed")
def test_without_onnx_the_mend_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"pip install 'onnx>=1\.17' 'onnxscript>=0\.3' 'onnxruntime>=1\.20'$"
    ):
        forms.write_onnx(tmp_path / "a.onnx", model("small"))
