"""SalUn's promise: what is outside the mask does not move, and the mask is the definition's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Phase, Run
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.methods.finetune import Finetune
from letheon.methods.random_label import RandomLabel
from letheon.methods.saliency import load_masks, mask_facts, saliency_masks, save_masks
from letheon.methods.salun import SalUn
from tests.world import FORGOTTEN, images, masks_of, network, run_of, trained

RECIPE = Recipe(epochs=3, lr=0.05, batch_size=8, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("inner", [RandomLabel(RECIPE), Finetune(RECIPE),
                                   RandomLabel(replace(RECIPE, optimizer="adamw"))])  # fmt: skip
def test_weights_outside_the_mask_are_bitwise_unmoved(density: float, inner: Finetune) -> None:
    before = list(network().parameters())
    method = SalUn(inner, density)
    run, _ = trained(method)
    after = list(run.model.parameters())
    masks = masks_of(method)
    moved = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
    total = sum(p.numel() for p in before)
    for start, now, mask in zip(before, after, masks, strict=True):
        assert torch.equal(now[~mask].view(torch.int32), start[~mask].view(torch.int32))
    assert sum(int(mask.sum()) for mask in masks) == round(density * total)
    assert moved > 0.8 * density * total  # it does train; a dead ReLU may leave some at rest


def test_the_published_leak_moves_them() -> None:
    before = list(network().parameters())
    method = SalUn(Finetune(RECIPE), 0.5, leak=True)
    run, _ = trained(method)
    outside = [
        torch.equal(now[~mask], start[~mask])
        for start, now, mask in zip(before, run.model.parameters(), masks_of(method), strict=True)
        if not mask.all()
    ]
    assert not any(outside)


def test_mask_ranks_the_summed_signed_gradient() -> None:
    data, model = images(), network().eval()
    chosen = torch.isin(torch.from_numpy(data.labels), torch.tensor(FORGOTTEN))
    pixels = torch.from_numpy(data.pixels[chosen.numpy()]).permute(0, 3, 1, 2) / 255
    loss = F.cross_entropy(
        model((pixels - 0.5) / 0.25).logits, torch.from_numpy(data.labels)[chosen], reduction="sum"
    )
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    threshold = flat.abs().sort(descending=True).values[round(0.25 * len(flat)) - 1]
    masks = saliency_masks(run_of(Finetune(RECIPE)), [0.25])[0]
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), flat.abs() >= threshold)


def test_a_saved_mask_gives_the_same_run(tmp_path: Path) -> None:
    run = run_of(Finetune(RECIPE))
    masks = dict(zip([0.2, 0.5], saliency_masks(run, [0.2, 0.5]), strict=True))
    names = [name for name, _ in run.model.net.named_parameters()]
    file = tmp_path / "masks.safetensors"
    save_masks(file, masks, {"weights": weights_digest(run.model)})
    made, _ = trained(SalUn(Finetune(RECIPE), 0.2))
    loaded, _ = trained(SalUn(Finetune(RECIPE), 0.2, mask=file))
    assert weights_digest(made.model) == weights_digest(loaded.model)
    with pytest.raises(InputError, match="holds"):
        load_masks(file, 0.3, mask_facts(run), names)
    with pytest.raises(InputError, match="another request, .*weights"):
        load_masks(file, 0.2, {"weights": weights_digest(network(seed=1))}, names)
    facts = {"weights": weights_digest(run.model), "request": "class 2", "images": "digits"}
    save_masks(file, masks, facts)
    load_masks(file, 0.2, facts, names)
    load_masks(file, 0.2, {**facts, "unknown to the file": "x"}, names)
    for name in ("request", "images"):
        with pytest.raises(InputError, match=rf"another request, .*\({name} "):
            load_masks(file, 0.2, {**facts, name: "another"}, names)
    (tmp_path / "torn").write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="can be read"):
        load_masks(tmp_path / "torn", 0.2, {}, names)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.1, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(InputError, match="density"):
        SalUn(Finetune(), density)


@dataclass
class OwnMask(State):
    mask: list[Tensor]
    masks: dict[str, Tensor]
    start: dict[str, Tensor]


@dataclass(frozen=True)
class KeepsAMask(Finetune):
    """Has fields of SalUn's own names in its state, all of them wrong."""

    name: ClassVar[str] = "keeps-a-mask"

    def prepare(self, run: Run) -> OwnMask:
        own = run.named_parameters
        everything = {k: torch.ones_like(p, dtype=torch.bool) for k, p in own.items()}
        start = {k: torch.zeros_like(p) for k, p in own.items()}
        return OwnMask(list(everything.values()), everything, start)


@dataclass(frozen=True)
class MovesEverything(Finetune):
    """Moves every weight in every event that it has."""

    name: ClassVar[str] = "moves-everything"

    def move(self, run: Run) -> None:
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(0.125)

    def prepare(self, run: Run) -> State:
        self.move(run)
        return State()

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        self.move(run)

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        self.move(run)

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        return torch.optim.SGD(run.parameters, 0.1, weight_decay=0.5)

    def finish(self, run: Run, state: State) -> None:
        self.move(run)


@pytest.mark.parametrize("inner", [KeepsAMask(RECIPE), MovesEverything(RECIPE)])
@pytest.mark.parametrize("reduce", ["auto", "flat"])
def test_no_inner_method_moves_a_weight_outside_the_mask(inner: Method, reduce: str) -> None:
    method = SalUn(inner, density=0.3)
    masks, before = masks_of(method), list(network().parameters())
    run = run_of(method)
    run.precision = Precision("fp32", reduce=reduce)  # type: ignore[arg-type]
    run_method(method, run)
    moved = 0
    for now, start, mask in zip(run.model.parameters(), before, masks, strict=True):
        assert torch.equal(now[~mask].view(torch.int32), start[~mask].view(torch.int32))
        moved += int((now != start).sum())
    total = sum(mask.numel() for mask in masks)
    assert 0.2 * total < moved <= round(0.3 * total)


def test_a_wrapped_state_is_the_inner_methods_own() -> None:
    run = run_of(SalUn(KeepsAMask(RECIPE)))
    state = SalUn(KeepsAMask(RECIPE)).prepare(run)
    assert isinstance(state.inner, OwnMask)
    assert all(bool(mask.all()) for mask in state.inner.mask)
    assert not all(bool(mask.all()) for mask in state.masks.values())
