"""Activations that are computed again: the same bits, statistics and random numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.memory.activations import find_blocks, require_blocks
from letheon.engine.method import Method
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.methods.finetune import Finetune
from letheon.methods.munba import Munba
from letheon.methods.random_label import RandomLabel
from tests.pool import on_ranks
from tests.world import PRESET, network, run_of, weights

RECIPE = Recipe(epochs=2, lr=0.02, batch_size=8)
METHODS: dict[str, Method] = {
    "local": Finetune(RECIPE),
    "groups, micro-batches, halves": RandomLabel(
        replace(RECIPE, batch_norm_group=2, grad_accum_steps=2), order="paired"
    ),
    "two gradients of one forward pass": Munba(RECIPE),
}


class Block(nn.Sequential):
    """Counts its layers' first passes, those in the backward pass too."""

    passes = 0

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2)
        )

    def forward(self, images: Tensor) -> Tensor:
        Block.passes += self.training
        result: Tensor = super().forward(images)
        return result


def end(ranks: Ranks, name: str, again: bool) -> tuple[dict[str, Tensor], int]:
    """Weights of a run, and how often its blocks ran in training."""
    method = METHODS[name]
    torch.manual_seed(5)
    run = run_of(method, ranks)
    net = nn.Sequential(
        nn.Sequential(Block(3), Block(6)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    run.model = Classifier(net, "blocks", PRESET)
    run.recipe = replace(run.recipe, activation_checkpoint=again)
    Block.passes = 0
    run_method(method, run)
    assert all("forward" not in vars(layer) for layer in run.model.modules())
    return weights(run), Block.passes


@pytest.mark.parametrize("name", METHODS)
def test_the_end_is_that_of_activations_kept(name: str) -> None:
    kept, passes = end(Ranks(), name, False)
    again, more = end(Ranks(), name, True)
    assert more >= 2 * passes > 0
    assert all(torch.equal(again[key], value) for key, value in kept.items())


@pytest.mark.slow
def test_on_two_ranks() -> None:
    kept, again = (on_ranks(2, end, "local", way)[0][0] for way in (False, True))
    assert all(torch.equal(again[key], value) for key, value in kept.items())


def test_blocks_of_our_networks() -> None:
    with torch.device("meta"):
        found = {name: len(find_blocks(build(name, 10))) for name in ("resnet20", "vit_tiny_16")}
    assert found == {"resnet20": 9, "vit_tiny_16": 12}
    with pytest.raises(InputError, match="without blocks"):
        require_blocks(network(), "activation_checkpoint")
    run = run_of(METHODS["local"])
    recipe = replace(RECIPE, activation_checkpoint=True)
    with pytest.raises(InputError, match="with compile default"):
        replace(run, recipe=recipe, precision=Precision(compile="default"))
