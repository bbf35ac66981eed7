"""Plain references of methods: float64, one process, the loader's own batches, torch's SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch, Loader, Reads, Stream
from tests.world import network, run_of

RECIPE = Recipe(epochs=1, lr=0.05, batch_size=11, weight_decay=0.01, batch_norm="frozen")
"""Three steps over the 31 retain images; the loops read what the loader delivers."""
FORGET = replace(RECIPE, batch_size=4)
"""Three steps over the 10 forget images."""
MIXED = replace(RECIPE, batch_size=14)
"""Three steps over all 41 images."""
Loss = Callable[[Classifier, Batch], Tensor]
Passes = Sequence[tuple[Stream | Reads, Loss]]


class Doubles(Loader):
    """The same batches in float64."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def train(self, stream: Stream | Reads, epoch: int, skip: int = 0) -> Iterator[Batch]:
        for batch in self.loader.train(stream, epoch, skip):
            yield batch._replace(images=batch.images.double())

    def sweep(self, indices: Sequence[int] | None = None, skip: int = 0) -> Iterator[Batch]:
        for batch in self.loader.sweep(indices, skip):
            yield batch._replace(images=batch.images.double())

    def steps(self, stream: Stream | Reads) -> int:
        return self.loader.steps(stream)


def original() -> Classifier:
    """The small network in float64, in evaluation mode."""
    return network().double().eval()


def run_in_doubles(method: Method, ranks: Ranks | None = None) -> Run:
    """A run of `method` on the small world in float64."""
    run = run_of(method, ranks)
    run.model, run.loader = run.model.double(), Doubles(run.loader)
    return run


def train_in_doubles(
    method: Method, run: Run | None = None
) -> tuple[Run, list[tuple[object, object]]]:
    """The run after its end, and the forget and retain samples that each phase read."""
    run, reads = run or run_in_doubles(method), []

    def log(kind: str, **facts: object) -> None:
        if kind == "phase":
            reads.append((facts["forget_read"], facts["retain_read"]))

    run_method(method, run, log)
    return run, reads


def descend(
    run: Run,
    passes: Callable[[int], Passes],
    net: Classifier | None = None,
    moving: Sequence[Tensor] | None = None,
    after_step: Callable[[Classifier], None] = lambda net: None,
) -> Classifier:
    """SGD of the recipe over the passes of each epoch; `moving` are the weights that train."""
    net, recipe = net or original(), run.recipe
    weights = list(net.parameters()) if moving is None else moving
    sgd = torch.optim.SGD(weights, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    for epoch in range(recipe.epochs):
        run.epoch.fill_(epoch)
        for stream, loss in passes(epoch):
            for batch in run.loader.train(stream, epoch):
                sgd.zero_grad()
                loss(net, batch).backward()
                sgd.step()
                after_step(net)
    return net


def assert_same(run: Run, net: Classifier) -> None:
    """Every weight and buffer agrees to 1e-10."""
    expected = net.net.state_dict()
    for key, value in run.model.net.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-10, rtol=0, msg=key)


def ce(net: Classifier, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(net(batch.images).logits, batch.labels)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """(B,) KL(p || q) of rows of probabilities; 0 log 0 is 0."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.log()), 0).sum(1)
