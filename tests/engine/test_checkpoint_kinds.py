"""The kinds of checkpoints that docs/bring-your-own.md lists: each is read, and computes as theirs.

No kind is told its architecture. Where another author's network has other keys, its forward pass is
that of `foreign_networks.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models as tv
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from letheon.engine.checkpoints.key_names import clean_keys, load, translate
from letheon.engine.checkpoints.model_file import load_model
from letheon.engine.models.classifier import Classifier, build
from tests.engine import test_timm_and_hub
from tests.engine.files import refusal, saved, state_of
from tests.engine.foreign_networks import (
    ResidualFunctionResNet,
    ShortcutResNet,
    authors_swin,
    hub_convnext,
    hub_resnet,
    hub_swin,
    hub_vit,
    timm_convnext,
    timm_swin,
    timm_vit,
    vit_logits,
)

DOC = Path(__file__).resolve().parents[2] / "docs" / "bring-your-own.md"
State = dict[str, Tensor]


def state(name: str = "resnet20", classes: int = 4, seed: int = 1) -> State:
    return state_of(build(name, classes, seed))


def shaken(net: nn.Module) -> nn.Module:
    """The network with batch norms that have seen something, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(0)
    for key, value in net.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(
                torch.rand(value.shape, generator=generator) + (0.5 if "bias" not in key else 0)
            )
    return net.eval()


# ------------------------------------------------------------------- the table


def prefixed(prefix: str, s: State) -> State:
    return {prefix + key: value for key, value in s.items()}


def pruned(s: State) -> State:
    net = build("resnet20", 4).plain_net()
    net.load_state_dict(s)
    for layer in [m for m in net.modules() if isinstance(m, nn.Conv2d)]:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    return net.state_dict()


def merged(s: State) -> State:
    """What pruning half of each convolution by size must leave."""
    out = dict(s)
    for key, value in s.items():
        if value.dim() == 4:
            smallest = value.abs().flatten().argsort()[: round(value.numel() * 0.5)]
            out[key] = value.clone()
            out[key].view(-1)[smallest] = 0
    return out


def counted(s: State) -> State:
    zero = torch.zeros(1, dtype=torch.float64)
    return s | {f"{p}total_{w}": zero for p in ("", "conv1.") for w in ("ops", "params")}


def whole(s: State) -> nn.Module:
    net = tv.resnet18(num_classes=4)
    net.load_state_dict(s)
    return net


NORMALIZE = {
    "normalize.mean": torch.tensor([0.4914, 0.4822, 0.4465]),
    "normalize.std": torch.tensor([0.2470, 0.2435, 0.2616]),
}
RESULT = {"accuracy": {"retain": 99.9}, "SVC_MIA": {"confidence": np.mean([0.16])}}
Kind = tuple[str, Callable[[State], Any], Callable[[State], State]]


def same(s: State) -> State:
    return s


KINDS: dict[str, Kind] = {  # row of the table: architecture, what is saved, what must be read
    "state dict": ("resnet20", same, same),
    "PyTorch's ImageNet example": (
        "resnet18",
        lambda s: {
            "epoch": 90, "arch": "resnet18", "state_dict": prefixed("module.", s),
            "best_acc1": torch.tensor(69.8),
            "optimizer": {"state": {0: {"momentum_buffer": s["fc.bias"]}}},
        },
        same,
    ),
    "torchvision's reference scripts": (
        "resnet20",
        lambda s: {
            "model": s, "args": argparse.Namespace(lr=0.1, output_dir=Path("x")), "epoch": 3,
            "model_ema": {**prefixed("module.", state(seed=2)), "n_averaged": torch.tensor(7)},
        },
        same,
    ),
    "official file of 2018": (
        "resnet18", lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, same,
    ),
    "whole network": ("resnet18", whole, same),
    "DataParallel": ("resnet20", lambda s: prefixed("module.", s), same),
    "torch.compile": ("resnet20", lambda s: prefixed("_orig_mod.", s), same),
    "Lightning": (
        "resnet20",
        lambda s: {
            "state_dict": prefixed("model.", s)
            | {"criterion.weight": torch.ones(4), "acc.total": torch.tensor(0)},
            "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 0.1},
        },
        same,
    ),
    "running average alone": ("resnet20", lambda s: {"state_dict_ema": s, "epoch": 3}, same),
    "AveragedModel": (
        "resnet20", lambda s: {**prefixed("module.", s), "n_averaged": torch.tensor(7)}, same,
    ),
    "profiler's counters": ("resnet20", lambda s: {"state_dict": counted(s)}, same),
    "pruned by torch": ("resnet20", lambda s: {"state_dict": pruned(s)}, merged),
    "SalUn and l1-sparse, ResNet-18": (
        "resnet18_cifar",
        lambda s: {"state_dict": s | NORMALIZE, "evaluation_result": RESULT},
        same,
    ),
    "SalUn and l1-sparse, VGG-16-BN": (
        "vgg16_bn_cifar",
        lambda s: {"state_dict": s | NORMALIZE, "best_sa": np.float64(93.1)},
        same,
    ),
    "half precision": (
        "resnet20",
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
        lambda s: {k: v.half().float() if v.is_floating_point() else v for k, v in s.items()},
    ),
    "head behind a dropout": (
        "resnet18", lambda s: {k.replace("fc.", "fc.1."): v for k, v in s.items()}, same,
    ),
    "head by another name": (
        "resnet18", lambda s: {k.replace("fc.", "last_linear."): v for k, v in s.items()}, same,
    ),
    "head beside the network": (
        "resnet20",
        lambda s: {
            k.replace("linear.", "classifier.") if k.startswith("linear.") else f"backbone.{k}": v
            for k, v in s.items()
        },
        same,
    ),
    "tuple or list": ("resnet20", lambda s: (3, [{"net": s, "acc": 93.1}]), same),
}  # fmt: skip
LARGE: dict[str, Kind] = {  # written once each
    "timm's Swin": ("swin_t", timm_swin, same),
    "Swin of its authors": ("swin_t", authors_swin, same),
    "transformers' Swin folder": ("swin_t", hub_swin, same),
    "timm's ConvNeXt": ("convnext_tiny", timm_convnext, same),
    "transformers' ConvNeXt folder": ("convnext_tiny", hub_convnext, same),
}
OTHERS = {  # rows with a test of their own, by its name
    "CIFAR ResNet-18, shortcut and linear": "test_other_authors_resnet18_computes_the_same",
    "CIFAR ResNet-18, residual_function": "test_other_authors_resnet18_computes_the_same",
    "timm's ViT": "test_a_vit_by_timm_and_by_transformers",
    "transformers' ViT folder": "test_a_vit_by_timm_and_by_transformers",
    "timm folder": "test_a_resnet_folder_of_transformers_and_one_of_timm",
    "transformers' ResNet folder": "test_a_resnet_folder_of_transformers_and_one_of_timm",
    "safetensors": "test_safetensors_of_others",
    "torch before 1.6": "test_a_kind_is_read_without_its_architecture",  # each, as "old"
    "timm's networks": "test_a_network_of_timm_by_name",
    "TorchScript": "test_a_scripted_network",
}


def equal(model: Classifier, expected: State) -> bool:
    actual = model.net.state_dict()
    return all(
        torch.equal(actual[k], v) for k, v in expected.items() if "num_batches" not in k
    ) and not set(expected) ^ set(actual)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_read_without_its_architecture(tmp_path: Path, kind: str, zipped: bool) -> None:
    name, save, expected = KINDS[kind]
    own = state(name)
    path = saved(tmp_path, save(own), _use_new_zipfile_serialization=zipped)
    lines: list[str] = []
    loaded = load_model(path, tell=lines.append)
    assert (loaded.name, loaded.classes) == (name, 4)
    assert equal(loaded, expected(own))
    [line] = lines
    assert f"{name} of 4 classes by its keys" in line
    if "SalUn" in kind:
        assert loaded.preset.std == (0.2470, 0.2435, 0.2616) and "std" not in line


@cache
def large(name: str) -> State:
    return state(name)


@pytest.mark.parametrize("kind", LARGE)
def test_the_keys_of_a_large_kind_become_ours(kind: str) -> None:
    name, save, _ = LARGE[kind]
    own = {k: v for k, v in large(name).items() if not k.endswith("relative_position_index")}
    named = translate(clean_keys(save(own)))
    assert not set(named) ^ set(own)
    assert all(torch.equal(load(named[key]), value) for key, value in own.items())


def test_a_large_kind_is_read_without_its_architecture(tmp_path: Path) -> None:
    own = large("swin_t")
    (tmp_path / "hub").mkdir()
    save_file(hub_swin(own), tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    loaded = load_model(tmp_path / "hub")
    assert (loaded.name, loaded.classes) == ("swin_t", 4) and equal(loaded, own)


def test_a_scripted_network(tmp_path: Path) -> None:
    own = state("resnet18")
    torch.jit.trace(whole(own).eval(), torch.zeros(1, 3, 32, 32)).save(tmp_path / "x.pt")
    assert equal(load_model(tmp_path / "x.pt"), own)


def test_safetensors_of_others(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x.safetensors")
    assert equal(load_model(tmp_path / "x.safetensors"), state())


def test_the_table_in_docs_has_these_rows() -> None:
    table = DOC.read_text(encoding="utf-8").partition("## Checkpoints")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", table, re.M)[1:]
    assert sorted(row for row in rows if not row.startswith("-")) == sorted(
        [*KINDS, *LARGE, *OTHERS]
    )
    for test in OTHERS.values():
        assert hasattr(test_timm_and_hub, test) or test in globals()


@pytest.mark.parametrize("kind", [ShortcutResNet, ResidualFunctionResNet])
def test_other_authors_resnet18_computes_the_same(tmp_path: Path, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = shaken(kind(5))
    path = saved(tmp_path, {"net": prefixed("module.", net.state_dict()), "acc": 95.1, "epoch": 3})
    loaded = load_model(path)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert loaded.name == "resnet18_cifar"
        assert torch.allclose(loaded(x).logits, net(x), atol=1e-4, rtol=1e-4)
        assert net(x).std() > 0.1


@pytest.mark.parametrize("size", [32, 64])
def test_a_vit_by_timm_and_by_transformers(tmp_path: Path, size: int) -> None:
    weights = timm_vit(size)
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(hub_vit(weights), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["ViTForImageClassification"]})
    )
    settings = {
        "size": {"height": size, "width": size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 3}))
    for path in (saved(tmp_path, weights), folder):
        loaded = load_model(path)
        assert (loaded.name, loaded.preset.size) == ("vit_tiny_16", size)
        with torch.no_grad():
            assert torch.allclose(loaded(x).logits, vit_logits(weights, x), atol=1e-4, rtol=1e-4)
    preset = loaded.preset
    assert (preset.mean, preset.std, preset.interpolation) == ((0.5,) * 3, (0.5,) * 3, "bicubic")
    assert (preset.resize, preset.resize_to) == ("square", size)


def test_a_resnet_folder_of_transformers_and_one_of_timm(tmp_path: Path) -> None:
    own = state("resnet18")
    hub, timm = tmp_path / "hub", tmp_path / "timm"
    hub.mkdir()
    timm.mkdir()
    torch.save(hub_resnet(own), hub / "pytorch_model.bin")
    settings = {
        "size": 224,
        "crop_pct": 0.875,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1, 1, 1],
    }
    (hub / "preprocessor_config.json").write_text(json.dumps(settings))
    (hub / "config.json").write_text("{}")
    loaded = load_model(hub)
    assert equal(loaded, own)
    assert loaded.preset.mean == (0.1, 0.2, 0.3)
    assert (loaded.preset.resize, loaded.preset.resize_to) == ("short", 256)
    save_file(own, timm / "model.safetensors")
    settings = {"input_size": [3, 160, 160], "crop_pct": 0.95, "interpolation": "bicubic"}
    config = {"architecture": "resnet18", "num_classes": 4, "pretrained_cfg": settings}
    (timm / "config.json").write_text(json.dumps(config))
    lines: list[str] = []
    loaded = load_model(timm, tell=lines.append)
    assert equal(loaded, own)
    assert (loaded.preset.size, loaded.preset.resize_to) == (160, 168)
    assert "assumed" not in lines[0]
    (timm / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": 3}}))
    assert "config cannot be read" in refusal(timm)


# ------------------------------------------------------------------- choices and refusals


def test_the_running_average_is_told_and_can_be_chosen(tmp_path: Path) -> None:
    plain, average = state(seed=1), state(seed=2)
    path = saved(tmp_path, {"state_dict": plain, "state_dict_ema": prefixed("module.", average)})
    lines: list[str] = []
    assert equal(load_model(path, tell=lines.append), plain)
    assert "instead of state_dict_ema.module" in lines[0]
    assert equal(load_model(path, part="plain"), plain)
    assert equal(load_model(path, part="ema", tell=lines.append), average)
    assert "a running average, part state_dict_ema.module" in lines[1]
    assert equal(load_model(path, part="state_dict_ema.module"), average)
    assert "expected plain, ema or one of state_dict" in refusal(path, part="best")
    two = saved(tmp_path, {"teacher": plain, "student": average})
    assert "several networks: teacher, student; name the part" in refusal(two)
    assert equal(load_model(two, part="student"), average)


def test_what_lies_beside_the_network_is_told(tmp_path: Path) -> None:
    lines: list[str] = []
    inside = prefixed("model.", state()) | {"criterion.weight": torch.ones(10)}
    load_model(saved(tmp_path, {"state_dict": inside}), tell=lines.append)
    assert "left out: criterion.weight;" in lines[0]


def test_an_assumed_size_is_told_and_given_fields_are_not(tmp_path: Path) -> None:
    path = saved(tmp_path, state("resnet18"))
    lines: list[str] = []
    assert load_model(path, tell=lines.append).preset.size == 224
    assert "assumed: size 224, resize short, resize_to 256, interpolation bilinear" in lines[0]
    given = {"size": 32, "mean": (0.5, 0.5, 0.5), "resize": "none"}
    preset = load_model(path, preset=given, tell=lines.append).preset
    assert (preset.size, preset.mean, preset.resize, preset.resize_to) == (
        32,
        (0.5,) * 3,
        "none",
        37,
    )
    assert lines[1].endswith("assumed: resize_to 37, interpolation bilinear, std 0.229 0.224 0.225")
    assert "0..1 scale" in refusal_of(path, {"mean": (123.7, 116.3, 103.5)})
    assert "pixels above 0" in refusal_of(path, {"size": 0})


def refusal_of(path: Path, preset: dict[str, Any]) -> str:
    with pytest.raises(Exception, match="expected") as caught:
        load_model(path, preset=preset)
    return str(caught.value)


def test_a_head_of_two_layers_is_refused_with_the_mend(tmp_path: Path) -> None:
    own = state("resnet18")
    head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 4)).state_dict()
    body = {k: v for k, v in own.items() if not k.startswith("fc.")}
    path = saved(tmp_path, body | prefixed("fc.", head))
    text = refusal(path, name="resnet18")
    assert "whose head has the layers fc.0, fc.2; expected one linear layer fc" in text
    assert "hand the network itself over" in text


def test_a_projection_is_no_head_and_the_nearest_network_is_named(tmp_path: Path) -> None:
    own = state("resnet18")
    body = {k: v for k, v in own.items() if not k.startswith("fc.")}
    for rest, says in (
        ({f"projector.1.{k}": own[f"fc.{k}"] for k in ("weight", "bias")}, "2 unexpected (proj"),
        ({f"fc.0.{k}": own[f"fc.{k}"] for k in ("weight", "bias")}, "2 unexpected (fc.0"),
        ({f"classifier.0.{k}": own[f"fc.{k}"] for k in ("weight", "bias")}, "2 unexpected (cla"),
        ({"head.weight": torch.zeros(4, 64), "head.bias": own["fc.bias"]}, "2 unexpected (head"),
        ({"a.weight": own["fc.weight"], "b.weight": own["fc.weight"]}, "2 unexpected"),
        ({"a.weight": torch.zeros(4, 64)}, "1 unexpected (a.weight)"),
        ({"fc.weight": own["fc.weight"]}, "with keys 1 missing (fc.bias); save the network"),
    ):
        text = refusal(saved(tmp_path, body | rest))
        assert "the nearest is resnet18, with keys" in text and says in text
        assert "hand the network itself over from Python" in text


def test_a_file_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    # A pickle of 5,000 lists, each in the next, which pickle itself could not write.
    body = pickle.dumps([], 2)[:-1] + b"\x85" * 5000 + b"."
    with zipfile.ZipFile(tmp_path / "deep.pt", "w") as archive:
        archive.writestr("deep/data.pkl", body)
    assert "cannot be read as weights" in refusal(tmp_path / "deep.pt")


def test_a_network_that_holds_itself_twice_at_every_level_is_refused(tmp_path: Path) -> None:
    net: nn.Module = nn.Identity()
    for _ in range(60):
        net = nn.Sequential(net, net)
    torch.save(net, tmp_path / "twice.pt")
    assert "a network of more than 1000000 parts" in refusal(tmp_path / "twice.pt")


def test_extra_and_missing_keys_stay_errors_under_a_wrapper(tmp_path: Path) -> None:
    own = prefixed("module.", state())
    more = saved(tmp_path, own | {"module.aux.weight": torch.zeros(2)}, "more.pth")
    assert "1 unexpected (aux.weight)" in refusal(more, name="resnet20")
    less = {k: v for k, v in own.items() if k != "module.conv1.weight"}
    assert "1 missing (conv1.weight)" in refusal(saved(tmp_path, less, "less.pth"), name="resnet20")


def test_a_network_pickled_with_its_code_leaves_out_passing_buffers(tmp_path: Path) -> None:
    net = copy.deepcopy(whole(state("resnet18")))
    net.register_buffer("scratch", torch.zeros(3), persistent=False)
    assert load_model(saved(tmp_path, {"model": net})).name == "resnet18"


def test_each_of_two_networks_has_its_own_normalize_layer(tmp_path: Path) -> None:
    plain, average = state(seed=1), state(seed=2)
    both = prefixed("model.", plain | NORMALIZE)
    other = {**NORMALIZE, "normalize.mean": torch.tensor([0.1, 0.2, 0.3])}
    both |= prefixed("model_ema.", average | other)
    path = saved(tmp_path, {"state_dict": both})
    assert load_model(path).preset.mean == (0.4914, 0.4822, 0.4465)
    chosen = load_model(path, part="ema")
    assert chosen.preset.mean == (0.1, 0.2, 0.3)
    assert equal(chosen, average)
    semantic = saved(tmp_path, {"semantic": plain, "ema": average})
    assert equal(load_model(semantic), plain)
