"""`import letheon`: light, the same runs as the command line, and nothing handed in is touched."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

import letheon
from letheon.engine.method import Method, Phase, Run
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.launch.inputs import build_method
from letheon.loaders.batch import Batch
from letheon.loaders.datasets.digits import upstream
from letheon.methods.finetune import Finetune
from letheon.methods.random_label import RandomLabel
from letheon.methods.salun import SalUn
from letheon.methods.train import Train
from tests.launch_tools import ROOT, Scripts

SHORT = Recipe(epochs=1, lr=0.02, batch_size=16)


def python(code: str, *path: Path) -> str:
    """What a fresh process prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False,
        cwd=path[0] if path else ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def residual(seed: int = 0) -> ResNet:
    """A torchvision network with every kind of layer, big enough for the small-image kernels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    net.conv1.weight.requires_grad_(False)
    return net.train()


def tensors(count: int = 48, seed: int = 0) -> TensorDataset:
    """Three classes that differ by their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 3, 16, 16, generator=generator) + labels[:, None, None, None]
    return TensorDataset(images, labels)


@dataclass
class Pictures:
    """A map-style dataset of PIL images, as torchvision's are without a transform."""

    pixels: np.ndarray
    targets: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[i]), int(self.targets[i])


def digits() -> tuple[Pictures, Pictures]:
    """The command line's digits as such datasets: train and test."""
    from letheon.loaders.datasets.image_set import ArrayImages

    train, test = upstream()
    assert isinstance(train, ArrayImages) and isinstance(test, ArrayImages)
    return (
        Pictures(train.pixels, train.labels.tolist(), train.classes),
        Pictures(test.pixels, test.labels.tolist(), test.classes),
    )


@dataclass(frozen=True)
class Shrink(Method):
    """A caller's own method: one pass over the forget set that shrinks the logits."""

    recipe: Recipe = SHORT

    def phases(self, run: Run, state: object, epoch: int) -> Sequence[Phase]:
        return [Phase("shrink", "forget", self._loss, "frozen")]

    def _loss(self, net: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = net(batch.images).logits
        return logits.square().mean()


def facts(net: nn.Module) -> list[object]:
    """Everything of a network that must not change."""
    return [
        [(name, type(module), module.training) for name, module in net.named_modules()],
        [(name, p.requires_grad, p.is_contiguous()) for name, p in net.named_parameters()],
        {name: value.clone() for name, value in net.state_dict().items()},
    ]


def same(one: list[object], other: list[object]) -> bool:
    before, after = one[2], other[2]
    assert isinstance(before, dict) and isinstance(after, dict)
    return (
        one[:2] == other[:2]
        and before.keys() == after.keys()
        and all(torch.equal(before[key], after[key]) for key in before)
    )


def test_the_import_is_light() -> None:
    heavy = "torch, numpy, PIL, tyro, torchvision"
    out = python(
        f"import sys, letheon; letheon.__version__; dir(letheon); letheon.errors.InputError; "
        f"print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_the_public_names() -> None:
    for name in letheon.__all__:
        assert getattr(letheon, name) is not None and name in dir(letheon)
    assert {"forget", "evaluate", "train", "load_model", "Method", "Phase", "errors"} <= set(
        letheon.__all__
    )
    with pytest.raises(AttributeError, match="unlearn"):
        _ = letheon.unlearn  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_run_is_that_of_the_command_line(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    ended = scripts(
        "forget", "--weights", original, "--forget", "class:3,8", "--out", tmp_path / "cli",
        "--device", "cpu", "salun", "--density", "0.3", "random-label", "--epochs", "1",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    digest = json.loads((tmp_path / "cli" / "run.json").read_text())["weights"]
    method = SalUn(RandomLabel(Recipe(epochs=1, lr=0.013)), density=0.3)
    train, test = digits()
    loaded = letheon.load_model(original)
    plain = loaded.plain_net()
    for model, images, forget in (
        (original, "digits", "class:3,8"),
        (str(original), train, [3, "8"]),
        (loaded, train, {"classes": [8, 3]}),
        (plain, train, ("3", "8")),
    ):
        result = letheon.forget(
            model, train=images, test=None if images == "digits" else test, forget=forget,
            method=method, device="cpu", preset=loaded.preset, out=tmp_path / "api",
            overwrite=True,
        )  # fmt: skip
        assert result.record["weights"] == digest
        assert result.request is not None and result.request.classes == (3, 8)
        if isinstance(model, nn.Module):
            assert type(result.model) is type(model)
    settings = json.loads((tmp_path / "api" / "settings.json").read_text())
    assert settings["method"]["density"] == 0.3 and settings["seed"] == 1


@pytest.mark.slow
def test_training_is_that_of_the_command_line(original: Path) -> None:
    method = Train(Recipe(epochs=12, lr=0.1, schedule="cosine"))
    result = letheon.train("small", train="digits", method=method)
    assert result.record["weights"] == json.loads((original / "run.json").read_text())["weights"]
    assert result.request is None and result.out is None and result.metrics


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_network_is_untouched(training: bool) -> None:
    net = residual().train(training)
    before, state = facts(net), torch.random.get_rng_state()
    result = letheon.forget(net, train=tensors(), forget=[1], device="cpu", method=Finetune(SHORT))
    assert same(facts(net), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    images = torch.randn(2, 3, 16, 16)
    assert type(net(images)) is Tensor and type(result.model(images)) is Tensor
    assert type(result.model) is ResNet and type(result.model.fc) is nn.Linear
    assert not same(facts(result.model), before) and facts(result.model)[:2] == before[:2]
    # A frozen layer stays as it was, and so does what the record says of the weights.
    assert torch.equal(result.model.conv1.weight, net.conv1.weight)


def test_the_network_is_saved_without_our_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = letheon.forget(
        residual(), train=tensors(), forget="class:1", device="cpu", method=Shrink()
    )
    torch.save(result.model, tmp_path / "net.pth")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("letheon", "tests")]:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(ImportError):
        import_module("letheon.engine")
    net = torch.load(tmp_path / "net.pth", weights_only=False)
    assert type(net(torch.zeros(2, 3, 16, 16))) is torch.Tensor


def test_a_method_of_the_callers_own_file() -> None:
    data = tensors()
    net = residual()
    forgotten = data.tensors[0][[0, 3, 5]]
    before = net.eval()(forgotten).square().mean()
    result = letheon.forget(net, train=data, forget={"samples": [0, 3, 5]}, method=Shrink())
    assert result.request is not None and result.request.samples == (0, 3, 5)
    [phase] = [line for line in result.metrics if line["kind"] == "phase"]
    assert phase["forget_read"] == 3 and phase["retain_read"] == 0
    assert result.model.eval()(forgotten).square().mean() < before
    masked = letheon.forget(net, train=data, forget=1, method=SalUn(Shrink(), density=0.25))
    pairs = zip(net.parameters(), masked.model.parameters(), strict=True)
    moved = sum(int((a != b).sum()) for a, b in pairs)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert 0 < moved <= round(0.25 * trained)


def test_evaluation_is_that_of_the_command_line(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    ended = scripts(
        "forget", "--weights", original, "--forget", "class:3", "--out", tmp_path / "ft",
        "--device", "cpu", "finetune", "--epochs", "1",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    ended = scripts(
        "evaluate", "--original", original, "--runs", tmp_path / "ft", "--device", "cpu",
        "--out", tmp_path / "table", "--random-control",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    expected = json.loads((tmp_path / "table" / "metrics.json").read_text())["rows"]
    model = letheon.load_model(original)
    result = letheon.forget(model, train="digits", forget=[3], method=Finetune(Recipe(epochs=1)))
    rows = letheon.evaluate(
        original=model, unlearned=result, train="digits", forget=[3], random_control=True
    )
    assert [row["role"] for row in rows] == ["original", "control", "unlearned"]
    for row, other in zip(rows, expected, strict=True):
        for key in ("FA", "RA", "TFA", "TRA", "cka_original"):
            assert row[key] == other[key], key


def test_rows_of_plain_networks() -> None:
    net, data = residual(), tensors()
    result = letheon.forget(net, train=data, forget=[1], device="cpu", method=Finetune(SHORT))
    before = facts(net)
    rows = letheon.evaluate(
        original=net, retrained=[residual(1), residual(2)], unlearned=[result, result.model],
        train=data, test=tensors(seed=1), forget=[1], device="cpu",
    )  # fmt: skip
    assert same(facts(net), before)
    assert [row["name"] for row in rows] == [
        "original", "retrained", "retrained-2", "finetune", "unlearned"
    ]  # fmt: skip
    with torch.no_grad():
        right = net.eval()(data.tensors[0]).argmax(1) == data.tensors[1]
    assert rows[0]["FA"] == pytest.approx(float(right[data.tensors[1] == 1].float().mean()))
    assert rows[3]["FA"] == rows[4]["FA"]


@pytest.mark.slow
def test_a_dataset_without_images_of_every_class(original: Path) -> None:
    images, labels = tensors().tensors
    net = residual()
    result = letheon.forget(
        net, train=TensorDataset(images[labels < 2], labels[labels < 2]), forget=[1],
        test=TensorDataset(images[:1], labels[:1]), device="cpu", method=Finetune(SHORT),
    )  # fmt: skip
    assert result.request is not None and result.request.classes == (1,)
    # A dataset that only numbers its classes has the names of the model's.
    train, _ = digits()
    named = letheon.load_model(original)
    named.class_names = tuple(f"digit {k}" for k in range(10))
    numbered = Pictures(train.pixels, train.targets, ())
    result = letheon.forget(named, train=numbered, forget=["digit 3"], method=Finetune(SHORT))
    assert result.request is not None and result.request.classes == (3,)


class Items:
    """As a Hugging Face dataset: items are dicts, a column is asked for by its name."""

    features: ClassVar = {"image": None, "label": SimpleNamespace(names=["cat", "dog", "emu"])}

    def __len__(self) -> int:
        return len(tensors())

    def __getitem__(self, at: int | str) -> object:
        images, labels = tensors().tensors
        return labels.tolist() if at == "label" else {"image": images[at], "label": labels[at]}


@pytest.mark.slow
def test_what_holds_the_same_images_gives_the_same_run() -> None:
    images, labels = tensors().tensors
    pairs = [*zip(images, labels.tolist(), strict=True)]
    sources = [tensors(), TensorDataset(images, labels.double()), pairs, Items()]
    sources += [DataLoader(tensors(), batch_size=7, shuffle=True, num_workers=2)]
    runs = [
        letheon.forget(residual(), train=train, forget=[1], device="cpu", method=Finetune(SHORT))
        for train in sources
    ]
    assert len({run.record["weights"] for run in runs}) == 1
    named = letheon.forget(
        residual(), train=Items(), forget=["dog"], device="cpu", method=Finetune(SHORT)
    )
    assert named.record["weights"] == runs[0].record["weights"]
    half = letheon.forget(
        residual().half(), train=Items(), forget=["dog"], device="cpu", method=Finetune(SHORT)
    )
    assert next(half.model.parameters()).dtype == torch.float16


def test_evaluation_takes_its_settings_by_name() -> None:
    def rows(**settings: object) -> letheon.Rows:
        return letheon.evaluate(
            original=residual(), train=tensors(), forget=[1], device="cpu", **settings
        )  # type: ignore[arg-type]

    assert rows(ks=[1, 3])[0]["conditions"]["ks"] == [1, 3]
    assert "audit" in rows(depth="full", attacks=0)[0] and "audit" not in rows()[0]
    for settings, expected in (
        ({"depth": "fulll"}, "did you mean full"),
        ({"dept": "full"}, "did you mean depth"),
        ({"ks": 5}, "expected the fields' types"),
        ({"random_control": True}, "no untrained network can be built"),
        ({"temperature": "1"}, "got temperature '1'; expected float"),
    ):
        with pytest.raises(InputError, match=expected):
            rows(**settings)


class NoHead(nn.Module):
    """A network that ends in more than its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(768, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)).log_softmax(1)


def test_a_method_by_name_takes_its_settings_by_name() -> None:
    assert build_method("finetune", epochs=3, lr=0.2) == Finetune(
        replace(Finetune().recipe, epochs=3, lr=0.2)
    )
    inner = RandomLabel(replace(RandomLabel().recipe, epochs=3), order="paired")
    assert build_method("salun", density=0.3, epochs=3, order="paired") == SalUn(inner, density=0.3)
    assert build_method("salun", inner="finetune", lr=0.2) == SalUn(
        Finetune(replace(Finetune().recipe, lr=0.2))
    )
    assert build_method("train", epochs=2).recipe.epochs == 2


@pytest.mark.parametrize(
    ("change", "expected", "option"),
    [
        ({"model": NoHead()}, "last linear layer, fc", "model"),
        ({"model": nn.Conv2d(3, 3, 1)}, "has no nn.Linear", ""),
        ({"model": 3}, "expected a path or an nn.Module", "model"),
        ({"forget": np.array([1, 2])}, "which say what the numbers mean", "forget"),
        ({"forget": {"rows": [1]}}, '{"samples": ...}', "forget"),
        ({"forget": ["nobody"]}, "unknown class 'nobody'", ""),
        ({"forget": {"samples": [-1]}}, "got sample -1", ""),
        ({"method": "forgetful"}, "got method 'forgetful'", "method"),
        ({"method": "retrain"}, "new weights", "method"),
        ({"batch": 3}, "got option batch of salun; expected one of", ""),
        ({"densty": 0.3}, "did you mean density", ""),
        ({"epochs": "three"}, "got", ""),
        ({"epochs": 1.5}, "got epochs 1.5; expected int", "epochs"),
        ({"batch_size": 2.5}, "expected int", "batch_size"),
        ({"lr": True}, "got lr True; expected float", "lr"),
        ({"recipe": {"epochs": 1}}, "expected Recipe", "recipe"),
        ({"method": ["salun"]}, "got method ['salun']", "method"),
        ({"precision": "bf16"}, "expected Precision", "precision"),
        ({"seed": "1"}, "got seed '1'; expected int", "seed"),
        ({"forget": [1.7]}, "expected names, or whole numbers", "forget"),
        ({"forget": {"samples": [1.5]}}, "expected names, or whole numbers", "forget"),
        ({"forget": {"samples": 5}}, "to forget", "forget"),
        ({"forget": [None]}, "to forget", "forget"),
        ({"forget": []}, "got no classes to forget", "forget"),
        ({"forget": True}, "got a bool to forget", "forget"),
        ({"method": SalUn}, "expected an instance, such as SalUn()", "method"),
        ({"lr": "0.1"}, "got lr '0.1'; expected float", "lr"),
        ({"train": [(torch.zeros(3, 8, 8), "cat")]}, "got the label 'cat'", ""),
        ({"train": [(torch.zeros(3, 8, 8), 1.5)]}, "got the label 1.5", ""),
        ({"train": [(torch.zeros(3, 8, 8), torch.eye(3)[0])]}, "label.argmax()", ""),
        ({"train": tensors().tensors}, "TensorDataset(images, labels)", ""),
        ({"train": [{"pixels": 1, "label": 2}]}, "got a dict of pixels, label", ""),
        ({"train": {"train": tensors()}}, "expected one dataset", "train"),
        ({"train": iter(tensors())}, "list(dataset)", "train"),
        ({"train": DataLoader(tensors(), sampler=range(8))}, "DataLoader with a range", "train"),
        ({"train": DataLoader(tensors(), collate_fn=list)}, "a collate function", "train"),
        ({"test": TensorDataset(torch.zeros(9, 3, 16, 16), torch.arange(9))}, "9 classes", "test"),
        ({"method": SalUn(RandomLabel()), "density": 0.3}, "beside an instance of salun", ""),
        ({"train": digits()[0], "forget": [3]}, "without a preset", "preset"),
        ({"preset": {"pixels": 3}}, "got preset", "preset"),
    ],
)
def test_what_is_refused(
    change: dict[str, object], expected: str, option: str, tmp_path: Path
) -> None:
    values = {"model": residual(), "train": tensors(), "forget": [1], "out": tmp_path / "out"}
    with pytest.raises(InputError) as caught:
        letheon.forget(**values | change)  # type: ignore[arg-type]
    assert expected in str(caught.value) and "--" not in str(caught.value)
    assert caught.value.option == option or not option
    assert not (tmp_path / "out").exists()


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    """What setup.py installs, data files and command included, works without the checkout."""
    (tmp_path / "base").mkdir()
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path / "base"),
         "--build-lib", str(tmp_path / "lib"), "egg_info", "--egg-base", str(tmp_path / "base")],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    tracked = subprocess.run(
        ["git", "ls-files", "kernels", "loaders", "engine", "methods", "eval", "launch"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    kinds = re.search(r"^KINDS = (\(.*\))$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert kinds
    for path in tracked:
        if path.endswith((".py", *(f".{kind}" for kind in ast.literal_eval(kinds[1])))):
            assert (tmp_path / "lib" / "letheon" / path).is_file(), path
    assert (tmp_path / "lib" / "letheon" / "py.typed").is_file()
    [points] = (tmp_path / "base").glob("*.egg-info/entry_points.txt")
    assert "letheon = letheon.launch.main:main" in points.read_text()
    out = python(
        "import sys; sys.argv = ['letheon', '--version']; import letheon.launch.main as m; "
        "m.main(); print(m.__file__)",
        tmp_path / "lib",
    )
    assert out.split() == [
        "letheon", letheon.__version__, str(tmp_path / "lib/letheon/launch/main.py")
    ]  # fmt: skip


def test_no_text_names_a_package_on_the_index() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--", ".", ":!tests"], cwd=ROOT, check=True, capture_output=True,
    ).stdout.decode()  # fmt: skip
    odd = []
    for name in listed.splitlines():
        text = (ROOT / name).read_bytes().decode("utf-8", "ignore") if Path(name).suffix else ""
        joined = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)  # a message broken over lines is one
        odd += [(name, m[0]) for m in re.finditer(r"pip install[^`\n]{0,80}?\bletheon\b", joined)]
    assert odd == []
