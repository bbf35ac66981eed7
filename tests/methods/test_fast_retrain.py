"""The fast retrain: whitening, rates of their own, and the network under every method."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.models.speed_cnn import EPSILON, SpeedCnn, WhiteningConv2d
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.kernels.keyed import permutation
from letheon.launch.command import parse
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.preset import Preset
from letheon.methods.fisher import Fisher
from letheon.methods.retrain import Retrain
from letheon.methods.train import Train
from tests.engine.resume_tools import differing
from tests.launch_tools import ROOT, SCRIPTS
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import weights

HALF = (0.5, 0.5, 0.5)
PRESET = Preset(16, HALF, HALF, "none", 16, augment="reflect-crop-alternate")
FAST = Recipe(
    epochs=2, lr=0.1, batch_size=7, momentum=0.6, optimizer="muon", schedule="linear", ema=0.5
)
FROZEN = Recipe(epochs=1, lr=0.02, batch_size=7, batch_norm="frozen")


def pixels() -> NDArray[np.uint8]:
    """41 images of noise whose brightness tells the class; neighbors resemble each other."""
    noise = np.random.default_rng(4).integers(0, 120, (41, 8, 8, 3))
    small = noise + (np.arange(41) * 7 % 4 * 40)[:, None, None, None]
    return small.repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)


def run_of(method: Method, ranks: Ranks | None = None, seed: int = 0, dark: bool = False) -> Run:
    """A run on a narrow network; `dark` makes the forget images black."""
    ranks = ranks or Ranks()
    labels = np.arange(41, dtype=np.int64) * 7 % 4
    forget = labels == 2
    images = pixels()
    if dark:
        images[forget] = 0
    data = ArrayImages("noise", images, labels, [f"c{c}" for c in range(4)])
    torch.manual_seed(3)
    model = Classifier(SpeedCnn(4, (4, 6, 8), depth=3), "narrow", PRESET)
    reader = Reader(seed, ranks.rank, ranks.world)
    return Run(
        model=model,
        loader=TorchLoader(data, forget, PRESET, method.recipe.batch_size, reader),
        recipe=method.recipe, ranks=ranks, seed=seed,
        forget=torch.from_numpy(forget), forget_classes=(2,),
    )  # fmt: skip


def whitening(method: Method, ranks: Ranks | None = None, dark: bool = False) -> torch.Tensor:
    run = run_of(method, ranks, dark=dark)
    method.prepare(run)
    layer = run.model.net.get_submodule("whitening")
    assert isinstance(layer, WhiteningConv2d)
    return layer.weight.clone()


def on_rank(ranks: Ranks) -> torch.Tensor:
    return whitening(Retrain(FAST), ranks)


@pytest.mark.parametrize("count", [5000, 12])
@pytest.mark.parametrize("method", [Retrain(FAST), Train(FAST)], ids=["retrain", "train"])
def test_whitening_is_numpys_eigenvectors_of_patches_cut_by_hand(
    method: Retrain | Train, count: int
) -> None:
    method = replace(method, whitening_images=count)
    used = np.flatnonzero(np.arange(41) * 7 % 4 != 2) if isinstance(method, Retrain) else range(41)
    members = np.array(used)
    if count < len(members):
        members = np.sort(members[permutation(0, "statistics", 0, len(members))[:count].numpy()])
    rows = []
    for image in pixels()[members] / 255.0 * 2 - 1:  # (x - 0.5) / 0.5
        for top in range(15):
            for left in range(15):
                patch = image[top : top + 2, left : left + 2]
                rows.append(patch.transpose(2, 0, 1).ravel())
    patches = np.array(rows)
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    found = whitening(method).double().flatten(1).numpy()
    assert found.shape == (24, 12)
    assert np.allclose(found[12:], -found[:12])
    for row, value, vector in zip(found, values, vectors.T, strict=False):
        expected = vector / np.sqrt(value + EPSILON)
        assert np.allclose(row, expected, atol=1e-4) or np.allclose(row, -expected, atol=1e-4)
        assert row[np.abs(row).argmax()] > 0
    answers = patches @ found[:12].T  # decorrelated, of the stated size
    moments = answers.T @ answers / len(answers)
    assert np.allclose(moments, np.diag(values / (values + EPSILON)), atol=1e-4)


def test_no_forget_sample_enters_a_retrains_whitening_and_ranks_agree() -> None:
    alone = whitening(Retrain(FAST))
    assert torch.equal(alone, whitening(Retrain(FAST), dark=True))
    assert not torch.allclose(whitening(Train(FAST)), whitening(Train(FAST), dark=True))
    shared = on_ranks(2, on_rank)
    assert torch.equal(*shared)
    torch.testing.assert_close(shared[0], alone, atol=1e-5, rtol=0)


def test_whitening_and_gains_stay_fixed_and_are_saved() -> None:
    method = Retrain(FAST, bias_rate=3.0, head_rate=0.5, decay_norms=False)
    run = run_of(method)
    before = whitening(method)
    run_method(method, run)
    run.model.requires_grad_(True)  # as some methods do at their end
    fixed = {
        n for n in run.model.net.state_dict() if n not in dict(run.model.net.named_parameters())
    }
    norms = {f"block{b}.norms.{k}" for b in (1, 2, 3) for k in range(3)}
    kinds = ("weight", "running_mean", "running_var", "num_batches_tracked")
    assert fixed == {f"{norm}.{kind}" for norm in norms for kind in kinds} | {"whitening.weight"}
    after = weights(run)
    assert torch.equal(after["whitening.weight"], before)
    assert all(
        torch.equal(after[f"{n}.weight"], torch.ones(len(after[f"{n}.weight"]))) for n in norms
    )
    again = run_of(method)
    run_method(method, again)
    assert all(torch.equal(value, weights(again)[key]) for key, value in after.items())


def test_biases_and_head_have_rates_of_their_own() -> None:
    recipe = Recipe(epochs=1, lr=0.1, batch_size=64, momentum=0.0, weight_decay=0.0)
    plain, scaled = (Retrain(recipe), Retrain(recipe, bias_rate=4.0, head_rate=0.5))
    ends = []
    for method in (plain, scaled):
        run = run_of(method)
        start = weights(run)
        run_method(method, run)
        ends.append({n: weights(run)[n] - start[n] for n, _ in run.model.net.named_parameters()})
    for name, moved in ends[0].items():
        factor = 4.0 if moved.dim() < 2 else 0.5 if name == "head.weight" else 1.0
        torch.testing.assert_close(ends[1][name], factor * moved, atol=1e-6, rtol=1e-4)


def test_a_frozen_head_has_no_rate_and_keeps_its_bits() -> None:
    method = Retrain(Recipe(epochs=1, lr=0.1, batch_size=64), head_rate=0.5)
    run = run_of(method)
    run.model.head.weight.requires_grad_(False)
    start = weights(run)
    run_method(method, run)
    moved = {key for key, value in weights(run).items() if not torch.equal(value, start[key])}
    assert "head.weight" not in moved and "block1.norms.0.bias" in moved


def end(ranks: Ranks) -> dict[str, torch.Tensor]:
    method = Retrain(replace(FAST, batch_norm="frozen"), bias_rate=2.0, label_smoothing=0.2)
    run = run_of(method, ranks)
    run_method(method, run)
    return weights(run)


def test_two_ranks_end_as_one() -> None:
    alone = end(Ranks())
    first, second = on_ranks(2, end)
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, atol=2e-4, rtol=1e-4, msg=key)


def resumed(ranks: Ranks, folder: Path) -> list[str]:
    method = Retrain(FAST, bias_rate=2.0, head_rate=0.5, decay_norms=False)
    return differing(method, lambda: run_of(method, ranks), folder, [3, 4])


@pytest.mark.parametrize("world", [1, 2])
def test_a_stopped_retrain_goes_on_bit_for_bit(world: int, tmp_path: Path) -> None:
    assert on_ranks(world, resumed, tmp_path) == [[]] * world


def words(name: str) -> tuple[str, list[str]]:
    """The network of a recipe, and the options of its method as words."""
    text = (ROOT / "launch" / "recipes" / "fast" / f"{name}.toml").read_text(encoding="utf-8")
    recipe = tomllib.loads(text)
    options: list[str] = []
    for key, value in recipe["method"].items():
        if isinstance(value, bool):
            options.append(f"--{'' if value else 'no-'}{key}")
        elif key != "name":
            options += [f"--{key}", str(value)]
    return recipe["model"], options


@pytest.mark.parametrize("name", ["cifar94", "cifar96"])
def test_the_recipes_parse_in_both_scripts_and_are_the_pages(name: str) -> None:
    model, options = words(name)
    assert build(model, 10).preset.augment.startswith("reflect-crop-alternate")
    trained = parse(SCRIPTS["train"].Settings, ["--data", "d", "--out", "o", *options]).method
    start = ["--data", "d", "--out", "o", "--weights", "w", "--forget", "class:1", "retrain"]
    retrained = parse(SCRIPTS["forget"].Settings, [*start, *options]).method
    for field in dataclasses.fields(trained):
        assert getattr(trained, field.name) == getattr(retrained, field.name)
    assert trained.recipe.rate(trained.recipe.epochs) == 0
    page = (ROOT / "docs" / "retrain.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split() for line in page.splitlines() if f"--model {model} " in line]
    assert any(line[-len(options) :] == options for line in lines)


METHODS = cases(FROZEN, replace(FROZEN, lr=0.005))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_unlearns_the_network(name: str) -> None:
    method = METHODS[name]
    run = run_of(method)
    start = weights(run)
    if name == "scar":  # GELU's features may lie below zero, as ConvNeXt's
        with pytest.raises(InputError, match="features below zero"):
            run_method(method, run)
        return
    run_method(method, run)
    after = weights(run)
    assert torch.equal(after["whitening.weight"], start["whitening.weight"]) or method.from_scratch
    assert all(value.isfinite().all() for value in after.values())


def test_a_bias_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="has no bias"):
        method = Fisher(FROZEN, amplify="bias")
        method.check(run_of(method))
    for wrong in ({"bias_rate": -1.0}, {"head_rate": float("nan")}, {"whitening_images": 0}):
        with pytest.raises(InputError, match="got"):
            Retrain(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "millions", "features"), [("speed_cnn", 1.97, 256), ("speed_cnn_wide", 12.7, 512)]
)
def test_the_networks_sizes_and_half_precision(name: str, millions: float, features: int) -> None:
    model = build(name, 10).eval()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01) and model.head.in_features == features
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(images).logits
        with Precision("bf16").autocast(torch.device("cpu")):
            half = model(images).logits
    torch.testing.assert_close(half.float(), plain, atol=0.1, rtol=0.1)
    # The first filters of a block's first convolution pass their input on.
    first = model.net.get_submodule("block2.convs.0").weight.detach()
    expected = torch.eye(first.shape[1])
    assert torch.equal(first[: first.shape[1], :, 1, 1], expected)
