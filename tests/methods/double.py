"""Weights as one vector, and samples one by one, for definitions that hold to 1e-10."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from letheon.engine.loop import run_method
from letheon.engine.method import Method
from letheon.engine.models.classifier import Classifier
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Batch
from tests.methods.plain import ce, original, run_in_doubles

ONCE = Recipe(epochs=0, batch_size=12)
THREE = Recipe(
    epochs=1, lr=0.02, batch_size=12, momentum=0.0, weight_decay=0.0, batch_norm="frozen"
)
"""Three steps over the 31 retain samples; one over the 10 forget samples."""


def end_of(method: Method) -> Tensor:
    """(P,) the weights after the whole run."""
    run = run_in_doubles(method)
    method.check(run)
    run_method(method, run)
    return flat(run.model)


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


def samples(part: str) -> list[Batch]:
    """Every sample of a part as a batch of its own, ascending by number."""
    run = run_in_doubles(Method.__new__(_Nothing))
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
