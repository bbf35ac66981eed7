"""The small world in float64, and weights as one vector, for definitions that hold to 1e-10."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch, Loader, Reads, Stream
from tests.world import network, run_of

ONCE = Recipe(epochs=0, batch_size=12)
THREE = Recipe(
    epochs=1, lr=0.02, batch_size=12, momentum=0.0, weight_decay=0.0, batch_norm="frozen"
)
"""Three steps over the 31 retain samples; one over the 10 forget samples."""


class Doubled(Loader):
    """A loader whose images are float64."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def train(self, stream: Stream | Reads, epoch: int, skip: int = 0) -> Iterator[Batch]:
        for batch in self.loader.train(stream, epoch, skip):
            yield batch._replace(images=batch.images.double())

    def steps(self, stream: Stream | Reads) -> int:
        return self.loader.steps(stream)

    def sweep(self, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        for batch in self.loader.sweep(indices):
            yield batch._replace(images=batch.images.double())


def fresh(method: Method, ranks: Ranks | None = None) -> Run:
    """A run that has not begun."""
    run = run_of(method, ranks)
    run.model.double()
    run.loader = Doubled(run.loader)
    return run


def end_of(method: Method) -> Tensor:
    """(P,) the weights after the whole run."""
    run = fresh(method)
    method.check(run)
    run_method(method, run)
    return flat(run.model)


def original() -> Classifier:
    return network().double().eval()


def flat(model: Classifier) -> Tensor:
    return join([parameter.detach() for parameter in model.parameters()])


def unflat(vector: Tensor) -> list[Tensor]:
    """As tensors of the network's shapes."""
    model = original()
    vector_to_parameters(vector, model.parameters())
    return [parameter.detach() for parameter in model.parameters()]


def join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradient(model: Classifier, loss: Tensor) -> Tensor:
    """(P,), zero where the loss does not reach."""
    weights = list(model.parameters())
    grads = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    pairs = zip(weights, grads, strict=True)
    return join([torch.zeros_like(w) if g is None else g for w, g in pairs])


def step(model: Classifier, change: Tensor) -> None:
    vector_to_parameters(flat(model) + change, model.parameters())


def ce(model: Classifier, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.images).logits, batch.labels)


def samples(part: str) -> list[Batch]:
    """Every sample of a part as a batch of its own, ascending by number."""
    run = fresh(Method.__new__(_Nothing))
    keep = {"forget": run.forget, "retain": ~run.forget, "all": run.forget | ~run.forget}[part]
    [*batches] = run.loader.sweep(keep.nonzero().flatten().tolist())
    return [
        Batch(*(tensor[i : i + 1] for tensor in batch[:4]), 1)
        for batch in batches
        for i in range(len(batch.labels))
    ]


class _Nothing(Method):
    recipe = ONCE


def whole(part: str) -> Batch:
    """All samples of a part as one batch."""
    rows = samples(part)
    return Batch(*(torch.cat([row[k] for row in rows]) for k in range(4)), len(rows))  # type: ignore[call-overload]


def gradients(part: str, loss: Callable[[Classifier, Batch], Tensor] = ce) -> Tensor:
    """(n, P): each sample's own gradient, by the original network."""
    model = original()
    return torch.stack([gradient(model, loss(model, row)) for row in samples(part)])


def same(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-10; and the run has moved."""
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert not torch.equal(ours, flat(original()))
