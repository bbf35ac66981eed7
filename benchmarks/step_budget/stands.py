"""Every method's run, ready for its next step: on a CPU, on a GPU, or on one that is not there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from letheon.engine import compiled
from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks
from letheon.engine.method import Method, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.passes.one_pass import Pass
from letheon.engine.precision import Precision
from letheon.engine.runs.progress import EpochPart
from letheon.engine.step import Step, assemble
from letheon.kernels.keyed import uniform
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Batch, Reader
from letheon.loaders.datasets.image_set import ArrayImages, ImageSet
from letheon.methods import inner_fields
from letheon.methods.random_label import RandomLabel
from step_budget.fake_cuda import CUDA, Ledger, Mover, fake_cuda

CLASSES = 10
EACH = 4  # images of a class, for what a method prepares


@dataclass
class Stand:
    """A method whose `prepare` has been called."""

    method: Method
    run: Run
    state: State
    size: int  # pixels of its batches

    def phases(self) -> list[Phase]:
        """The passes of the first epoch."""
        return list(self.method.phases(self.run, self.state, 0)) if self.run.recipe.epochs else []

    def step(self) -> Step:
        """Join optimizers and gradients, as the loop does after `prepare`."""
        return assemble(self.method, self.run, self.state)

    def begin(self, step: Step, phase: Phase) -> Pass:
        """Begin a pass over one of the phases; `take` then takes its steps."""
        images = self.method.sources(self.run)
        sources: dict[str, Any] = {name: _open(one, self.run) for name, one in images.items()}
        one = Pass(self.run, step, phase, 0, EpochPart(0, 0.0, 1.0), lambda *_, **__: None, sources)
        one.begin()
        return one

    def batch(self, rows: int, phase: Phase) -> Batch:
        """Noise on the run's device, in the layout and parts that the phase reads."""
        torch.manual_seed(0)
        device, forget = self.run.ranks.device, self.run.forget
        size = phase.image_size or self.size
        images = torch.randn(rows, 3, size, size, device=device)
        index = torch.arange(rows, device=device) % len(forget)
        labels = index % self.run.model.classes
        of_forget = torch.arange(rows, device=device) * 2 >= rows
        return Batch(
            images.to(memory_format=torch.channels_last), labels, of_forget, index, rows
        )  # fmt: skip


def _open(images: ImageSet, run: Run) -> TorchLoader:
    none = np.zeros(len(images), np.bool_)
    return TorchLoader(images, none, run.model.preset, run.recipe.batch_size, Reader(0))


def build_stand(
    method: Method, model: Classifier, size: int, device: torch.device, precision: Precision
) -> Stand:
    """Prepare a method for real, on a copy of the model and a few images of noise.

    Args:
        method: with a recipe whose batch is that of the steps.
        model: of `CLASSES` classes, on the host.
        size: pixels of the steps' images; what is prepared sees those of the model's preset.
        device: where the run lies.
        precision: how it computes.
    """
    run = build_run(method, model, device, precision)
    return Stand(method, run, method.prepare(run) or State(), size)


def build_run(method: Method, model: Classifier, device: torch.device, precision: Precision) -> Run:
    """Build a run on `EACH` images of noise a class, before anything is prepared."""
    count = CLASSES * EACH
    labels = np.arange(count, dtype=np.int64) % CLASSES
    side = model.preset.size
    noise = uniform(0, "stand", 0, torch.arange(count), side * side * 3).numpy()
    pixels = (noise.reshape(count, side, side, 3) * 255).astype(np.uint8)
    images = ArrayImages("noise", pixels, labels, [f"c{c}" for c in range(CLASSES)])
    forget = labels == 0
    loader = TorchLoader(images, forget, model.preset, min(count, 20), Reader(0, device=device))
    run = Run(
        copy.deepcopy(model), loader, method.recipe, Ranks(device=device), 0,
        torch.from_numpy(forget).to(device), (0,), precision,
    )  # fmt: skip
    run.epoch = run.epoch.to(device)
    precision.apply(run.model, device)
    return run


@contextmanager
def fake_stand(stand: Stand) -> Iterator[tuple[Stand, Ledger]]:
    """Yield the same run with fake tensors of cuda, within `fake_cuda`, and its ledger."""
    model, state = copy.deepcopy((stand.run.model, stand.state))  # one copy of what both hold
    with fake_cuda() as ledger:
        mover = Mover()
        run = replace(
            stand.run,
            ranks=Ranks(device=CUDA),
            model=mover.move(model),
            forget=mover.move(stand.run.forget),
            epoch=mover.move(stand.run.epoch),
            shared=None,
        )
        yield Stand(stand.method, run, mover.move(state), stand.size), ledger


def count_graphs(stand: Stand, phase: Phase, rows: int = 8) -> tuple[int, str]:
    """Compile a phase's loss as the loop does, but without kernels, and call it in two epochs.

    Returns:
        The number of graphs, and why it is not one whole graph, "" where it is.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    own = [one for one in (phase, phase.beside) if one is not None]
    with mock.patch.object(compiled, "BACKEND", "eager"):
        try:
            for one in own:
                graph = compiled.compile_loss(one.loss, "default", stand.run.model)
                for epoch in range(2):
                    stand.run.epoch.fill_(epoch)
                    graph(stand.run.model, stand.batch(rows, one))
        except torch._dynamo.exc.Unsupported as error:
            return 0, str(error).splitlines()[0]
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]), ""


def build_method(kind: type[Method], batch_size: int) -> Method:
    """Return a method with its defaults and this batch, around random labels where it wraps one."""
    inner: dict[str, Any] = {field: RandomLabel() for field in inner_fields(kind)}
    for field, one in inner.items():
        inner[field] = replace(one, recipe=replace(one.recipe, batch_size=batch_size))
    method = kind(**inner)
    if inner:
        return method
    recipe = replace(method.recipe, batch_size=batch_size)
    return replace(method, recipe=recipe)  # type: ignore[type-var]
