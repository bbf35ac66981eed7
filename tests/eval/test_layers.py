"""CKA of all layers in one sweep, against stored activations and whatever the ranks."""

from __future__ import annotations

import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build, names
from letheon.errors import InputError
from letheon.eval.inference.extract import extract
from letheon.eval.inference.layer_cka import LayerCka, convolutions, layer_cka, stages
from letheon.eval.inference.taps import tapped
from letheon.eval.metrics.cka import centred, compare
from tests.eval.test_features import CLASSES, loader


def work(ranks: Ranks, indices: list[int] | None = None) -> dict[tuple[str, str], object]:
    models = {name: build("small", CLASSES, seed=s) for s, name in enumerate("abc")}
    taps = convolutions(models["a"])
    found = layer_cka(models, loader(ranks), ranks, taps, indices)
    return {pair: dict(layers) for pair, layers in found.items()}


def test_every_layer_and_pair_equals_the_stored_form() -> None:
    models = {name: build("small", CLASSES, seed=s) for s, name in enumerate("abc")}
    taps = convolutions(models["a"])
    stored = {
        name: extract(model, loader(Ranks()), Ranks(), taps=taps).taps
        for name, model in models.items()
    }
    found = work(Ranks())
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    for (first, second), layers in found.items():
        assert tuple(layers) == taps  # type: ignore[call-overload]
        for tap in taps:
            want = compare(centred("x", stored[first][tap]), centred("y", stored[second][tap]))
            got: LayerCka = layers[tap]  # type: ignore[index]
            assert got.value == pytest.approx(want.value, abs=1e-9)
            assert got.floor == pytest.approx(want.floor, abs=1e-9)


def test_how_many_rows_are_held_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = work(Ranks())
    monkeypatch.setattr("letheon.eval.inference.layer_cka._ROWS", 15)
    for pair, layers in work(Ranks()).items():
        for tap, got in layers.items():  # type: ignore[attr-defined]
            assert got == pytest.approx(whole[pair][tap], abs=1e-10)  # type: ignore[index]


def test_a_dead_layer_has_no_value_and_a_broken_one_is_named() -> None:
    models = {"a": build("small", CLASSES), "b": build("small", CLASSES, seed=1)}
    taps = convolutions(models["a"])
    last = models["b"].get_submodule(taps[-1])
    assert isinstance(last, torch.nn.Conv2d)
    torch.nn.init.zeros_(last.weight)
    if last.bias is not None:
        torch.nn.init.constant_(last.bias, 0.3)
    found = layer_cka(models, loader(Ranks()), Ranks(), taps)["a", "b"]
    assert found[taps[-1]] == (None, None)
    assert found[taps[0]].value is not None
    torch.nn.init.constant_(last.weight, float("nan"))
    with pytest.raises(InputError, match=f"{taps[-1]} of a or b"):
        layer_cka(models, loader(Ranks()), Ranks(), taps)


@pytest.mark.parametrize("name", [n for n in names() if n not in ("vit_b_16", "resnet44")])
@torch.no_grad()
def test_stages_are_run_before_the_head(name: str) -> None:
    model = build(name, 4).eval()
    found = stages(model)
    assert 4 <= len(found) <= 20
    assert f"net.{model.head_path}" not in found
    with tapped(model, found) as seen:
        model(torch.zeros(2, 3, model.preset.size, model.preset.size))
    assert list(seen) == list(found)
    assert all(values.ndim == 2 and len(values) == 2 for values in seen.values())


def test_resnet50_has_its_53_convolutions_and_usual_stages() -> None:
    model = build("resnet50", 4)
    assert len(convolutions(model)) == 53
    assert stages(model)[-4:] == tuple(f"net.layer{i}" for i in (1, 2, 3, 4))
