"""Under bf16 the network answers in bf16, and every loss counts in fp32 from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from letheon.engine.method import Run
from letheon.engine.models.classifier import Classifier, Output
from letheon.engine.models.initial import initial_copy
from letheon.engine.recipe import Recipe
from tests.methods.cases import cases
from tests.world import run_of

RECIPE = Recipe(epochs=1, lr=0.01, batch_size=16)
METHODS = {name: method for name, method in cases(RECIPE).items() if method.recipe.epochs}


class Rounded(nn.Module):
    """A network whose answers are rounded to bf16, and either stay so or become fp32 again."""

    half: bool = False

    def __init__(self, net: Classifier):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Output:
        with torch.autocast("cpu", enabled=False):
            output = self.net(images)
        rounded = (part.bfloat16() for part in output)
        return Output(*(part if Rounded.half else part.float() for part in rounded))


def losses(name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Of a batch of each phase, in parts where it has some: from bf16, and from that in fp32."""
    method, run = METHODS[name], run_of(METHODS[name])
    run.held_out = lambda: run.loader
    Rounded.half = False
    state = method.prepare(run)
    net = Rounded(run.model)
    with torch.no_grad():  # away from the original, where a distance has a kink
        for k, weight in enumerate(run.parameters):
            weight += (
                0.02 * torch.linspace(-1, 1, weight.numel()).cos().view(weight.shape) * (k + 1)
            )
    for first in method.phases(run, state, 0):
        for phase in filter(None, (first, first.beside)):
            batch = next(iter(run.loader.train(phase.stream, 0)))
            batch = batch if phase.rows is None else phase.rows.attach(batch)
            pair = []
            for Rounded.half in (True, False):
                fresh = batch._replace(images=batch.images.clone())  # no teacher's remembered one
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=Rounded.half):
                    value = phase.loss(net, fresh)
                pair.append(value.values() if isinstance(value, Mapping) else [value])
            yield from zip(*pair, strict=True)


@pytest.mark.parametrize("name", METHODS)
def test_losses_count_in_fp32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "teacher", lambda run: Rounded(deepcopy(run.model).eval()))
    monkeypatch.setattr(
        Run, "untrained_teacher", lambda run, seed: Rounded(initial_copy(run.model, seed).eval())
    )
    for found, expected in losses(name):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
