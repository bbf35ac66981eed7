"""Sums over an image set: gradients, their squares, moments of classes and inputs, outputs.

The only place they come from. A statistic of one rank's own samples differs between ranks, and a
mask made from it would let the ranks drift apart without an error: here every sum is reduced over
the ranks and bitwise equal on all of them. All read each sample once, with the test transform, and
a model in evaluation mode (running batch-norm statistics, no dropout), which is left as it was.

A statistic is kept for the other runs of the call, under the digests of the weights and the forget
set and the cut into batches: several runs that start from one model compute it once, to the bit as
each would alone; images are decoded once while they fit (`ImageMemory`). Nobody may change these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.checkpoints.sweep_state import Gradients, Rows, SplitGradients, Sums
from letheon.engine.distributed import sum_over_ranks
from letheon.engine.method import Loss, Run
from letheon.engine.numbers.split_magnitudes import split_magnitude_sum
from letheon.engine.numbers.sweep import Part, batches, loss_name, repeat
from letheon.loaders.batch import Batch

T = TypeVar("T")
CHUNK = 32
"""Samples whose own gradients are in memory at once."""


def gradient_sum(run: Run, part: Part, loss: Loss) -> list[Tensor]:
    """Sum over the samples of the gradient of each sample's loss.

    Args:
        run: the run; its model's weights and gradients are left as they were.
        part: which training samples.
        loss: (net, batch) -> mean loss of the batch. Each batch's gradient is weighted by its size:
            the sum does not depend on the batch size, its last batch or the number of ranks.

    Returns:
        One float32 tensor per trainable parameter, in the order of `run.parameters`, and as these
        this rank's part where the network is split over the ranks.
    """
    key = ("gradient sum", part, _key(loss), *_moving(run))
    return reuse(run, key, lambda: _gradient_sum(run, part, loss))


def _gradient_sum(run: Run, part: Part, loss: Loss) -> list[Tensor]:
    model, shards = run.model, run.shards
    # Where the network is split the backward pass itself takes the mean over the ranks.
    weight = 1 if shards is None else run.ranks.world
    with evaluating(model):
        model.zero_grad(set_to_none=True)
        grads = Gradients(run.parameters) if shards is None else SplitGradients(shards)
        for batch in batches(run, part, f"gradient sum of {loss_name(loss)}", grads):
            with run.precision.autocast(run.ranks.device):
                value = loss(model, batch)
            (value * (len(batch.labels) * weight)).backward()
        sums = [*grads.tensors()]
        model.zero_grad(set_to_none=True)
    if shards is None:
        sum_over_ranks(sums, run.ranks)
    else:
        shards.clear()
    return sums


def squared_gradient_sum(
    run: Run, part: Part, loss: Loss, by: Literal["sample", "batch"] = "sample"
) -> list[Tensor]:
    """Sum over the samples of the squared gradient: the diagonal of the empirical Fisher, times N.

    Args:
        run: the run.
        part: which training samples.
        loss: (net, batch) -> mean loss of the batch.
        by: ``sample`` is the definition: each sample's own gradient is squared (exact, by
            `torch.func`). ``batch`` squares the mean gradient of each batch and multiplies it by
            the batch's size, the shortcut of many published codes: it depends on the batch size
            and on the ranks, and is about as many times too small.

    Returns:
        One float32 tensor per trainable parameter, as `gradient_sum`.
    """
    key = ("squared gradient sum", part, by, _key(loss), *_moving(run, by))
    return reuse(run, key, lambda: _magnitude_sum(run, part, loss, by, torch.square))


def squared_gradient_sum_of(run: Run, part: Part, losses: Sequence[Loss]) -> list[Tensor]:
    """Sum over several losses of `squared_gradient_sum`, of which the total alone is kept."""

    def compute() -> list[Tensor]:
        totals = [torch.zeros_like(parameter) for parameter in run.parameters]
        name, sums = f"squares of {[*map(loss_name, losses)]}", Sums(*totals)
        rest = repeat(run, part, name, sums, lambda skip: iter(losses[skip:]), len(losses))
        for loss in rest:
            torch._foreach_add_(totals, _magnitude_sum(run, part, loss, "sample", torch.square))
        return totals

    key = ("squared gradient sum of", part, *map(_key, losses), *_moving(run, "sample"))
    return reuse(run, key, compute)


def absolute_gradient_sum(
    run: Run, part: Part, loss: Loss, by: Literal["sample", "batch"] = "sample"
) -> list[Tensor]:
    """Sum over the samples of the absolute gradient; all else as `squared_gradient_sum`."""
    key = ("absolute gradient sum", part, by, _key(loss), *_moving(run, by))
    return reuse(run, key, lambda: _magnitude_sum(run, part, loss, by, torch.abs))


def _magnitude_sum(
    run: Run, part: Part, loss: Loss, by: str, magnitude: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    model, parameters, device = run.model, run.parameters, run.ranks.device
    name = f"{magnitude.__name__} by {by} of {loss_name(loss)}"
    with evaluating(model):
        if run.shards is not None:
            return split_magnitude_sum(run, part, loss, by, magnitude, name)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for batch in batches(run, part, name, Sums(*sums)):
            if by == "sample":
                for rows in torch.arange(len(batch.labels), device=device).split(CHUNK):
                    _add_magnitudes(run, loss, batch, rows, sums, magnitude)
                continue
            with run.precision.autocast(run.ranks.device):
                value = loss(model, batch)
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
            for total, one in zip(sums, grads, strict=True):
                if one is not None:
                    total += magnitude(one.to(total.dtype)) * len(batch.labels)
    sum_over_ranks(sums, run.ranks)
    return sums


def _add_magnitudes(
    run: Run,
    loss: Loss,
    batch: Batch,
    rows: Tensor,
    sums: list[Tensor],
    magnitude: Callable[[Tensor], Tensor],
) -> None:
    """Add the magnitudes of these rows' gradients, each computed as a batch of one sample.

    In the weights' own number format: under autocast torch cannot vectorize the gradient.
    """
    model = run.model
    own, other = weights_by_name(model)

    def one(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
        image, label, forget, index = (tensor[None] for tensor in sample)
        rows = Batch(image, label, forget, index, 1)

        def net(images: Tensor) -> Any:
            return functional_call(model, {**weights, **other}, (images,))

        return loss(cast(nn.Module, net), rows)

    grads = vmap(grad(one), in_dims=(None, 0, 0, 0, 0), randomness="different")(
        own, *(tensor[rows] for tensor in (batch.images, batch.labels, batch.forget, batch.index))
    )
    for total, each in zip(sums, grads.values(), strict=True):
        total += magnitude(each).sum(0)


def weights_by_name(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trainable parameters by name, and everything else that a functional call needs."""
    own = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    other = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}
    return own, other | dict(model.named_buffers())


class ClassMoments(NamedTuple):
    """Of the pooled features, by label; float64, C classes, D features."""

    count: Tensor  # type: ignore[assignment]  # (C,)
    mean: Tensor  # (C, D); zero for a class without a sample
    variance: Tensor  # (C, D), over the class's samples, divided by their number


def class_moments(run: Run, part: Part) -> ClassMoments:
    """Number, mean and variance of the features of each class."""
    key = ("class moments", part, run.recipe.batch_size)
    return reuse(run, key, lambda: _class_moments(run, part))


def _class_moments(run: Run, part: Part) -> ClassMoments:
    classes, width = run.model.classes, run.model.head.in_features
    device = run.ranks.device
    count = torch.zeros(classes, dtype=torch.float64, device=device)
    sums = torch.zeros(2, classes, width, dtype=torch.float64, device=device)
    with evaluating(run.model), torch.no_grad():
        for batch in batches(run, part, "class moments", Sums(count, sums)):
            with run.precision.autocast(run.ranks.device):
                features = run.model(batch.images).features.double()  # (B, D)
            count.index_add_(0, batch.labels, torch.ones_like(batch.labels, dtype=torch.float64))
            sums[0].index_add_(0, batch.labels, features)
            sums[1].index_add_(0, batch.labels, features.square())
    sum_over_ranks([count, sums], run.ranks)
    mean, square = sums / count.clamp(min=1)[:, None]
    return ClassMoments(count, mean, (square - mean.square()).clamp(min=0))


class ClassCovariances(NamedTuple):
    """Of the pooled features, each to a power, by label; float64, C classes, D features."""

    count: Tensor  # type: ignore[assignment]  # (C,)
    mean: Tensor  # (C, D); zero for a class without a sample
    covariance: Tensor  # (C, D, D), over the class's samples, divided by their number


def class_covariances(run: Run, part: Part, power: float = 1.0) -> ClassCovariances:
    """Number, mean and covariance of the features of each class, each feature to the `power`.

    A feature below zero has no fractional power: its class's moments are NaN.
    """
    key = ("class covariances", part, power, run.recipe.batch_size)
    return reuse(run, key, lambda: _class_covariances(run, part, power))


def _class_covariances(run: Run, part: Part, power: float) -> ClassCovariances:
    classes, width = run.model.classes, run.model.head.in_features
    zeros = partial(torch.zeros, dtype=torch.float64, device=run.ranks.device)
    count, total, products = zeros(classes), zeros(classes, width), zeros(classes, width, width)
    name, own = f"class covariances {power}", Sums(count, total, products)
    with evaluating(run.model), torch.no_grad():
        for batch in batches(run, part, name, own):
            with run.precision.autocast(run.ranks.device):
                features = run.model(batch.images).features.double() ** power  # (B, D)
            for label in batch.labels.unique().tolist():
                rows = features[batch.labels == label]
                count[label] += len(rows)
                total[label] += rows.sum(0)
                products[label] += rows.T @ rows
    sum_over_ranks([count, total, products], run.ranks)
    size = count.clamp(min=1)
    mean = total / size[:, None]
    covariance = products / size[:, None, None] - mean[:, :, None] * mean[:, None, :]
    return ClassCovariances(count, mean, covariance)


def input_covariances(
    run: Run, part: Part, layers: Sequence[str], samples: int | None = None
) -> dict[str, Tensor]:
    """For each layer the uncentered sum of x x^T over what it is given.

    Args:
        run: the run.
        part: which training samples.
        layers: dotted paths in `run.model.net` of layers that `reads_rows`.
        samples: at most so many of them, drawn by the run's seed; None: all.

    Returns:
        Path -> (D, D) float64. A row x is an input of a linear layer; for a convolution it is a
        patch of its input in the order of its weight's (in, height, width), one for each position
        of its output.
    """
    drawn = None if samples is None else (samples, run.seed)
    key = ("input covariances", part, tuple(layers), drawn, run.recipe.batch_size)
    return reuse(run, key, lambda: _input_covariances(run, part, layers, samples))


def _input_covariances(
    run: Run, part: Part, layers: Sequence[str], samples: int | None
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    listening = False  # not to the blank images of a network that is split over the ranks

    def add(path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if listening:
            rows = _rows(layer, inputs[0])
            sums[path] += rows.T @ rows

    hooks = []
    for path in layers:
        layer = run.model.net.get_submodule(path)
        wide = _rows(layer, None)
        sums[path] = torch.zeros(wide, wide, dtype=torch.float64, device=run.ranks.device)
        hooks.append(layer.register_forward_pre_hook(partial(add, path)))
    name = f"input covariances of {[*layers]}"
    try:
        with evaluating(run.model), torch.no_grad():
            for batch in batches(run, part, name, Sums(*sums.values()), samples):
                with run.precision.autocast(run.ranks.device):
                    listening = True
                    run.model(batch.images)
                    listening = False
    finally:
        for hook in hooks:
            hook.remove()
    sum_over_ranks([sums[path] for path in layers], run.ranks)
    return sums


def patch_moments(
    run: Run, part: Part, side: int, samples: int | None = None
) -> tuple[Tensor, int]:
    """Uncentered sum of x x^T over the patches of the images themselves, and how many there are.

    Args:
        run: the run; its network is not asked.
        part: which training samples, with the test transform.
        side: pixels of a patch's side; one at every position inside the image.
        samples: at most so many of them, drawn by the run's seed; None: all.

    Returns:
        (D, D) float64, D = channels x side x side in the order of a convolution's weight, and the
        number of patches; equal on every rank.
    """
    sums = torch.zeros(2 * [3 * side**2], dtype=torch.float64, device=run.ranks.device)
    count = torch.zeros((), dtype=torch.float64, device=sums.device)
    for batch in batches(run, part, f"patches of {side}", Sums(sums, count), samples):
        rows = F.unfold(batch.images.double(), side).transpose(1, 2).flatten(0, 1)
        sums += rows.T @ rows
        count += len(rows)
    sum_over_ranks([sums, count], run.ranks)
    return sums, int(count)


class IndexedOutputs(NamedTuple):
    """What the model answers to each of the n samples that this rank has asked about, ascending by
    their number in the set."""  # noqa: D205, D209

    index: Tensor  # type: ignore[assignment]  # (n,) int64
    logits: Tensor  # (n, classes), in the type of the weights
    features: Tensor  # (n, D), the same
    labels: Tensor  # (n,) int64, of the training set


def outputs_by_index(run: Run, part: Part) -> IndexedOutputs:
    """Logits, features and labels of this rank's share of the part, on the device: every sample of
    it on one rank, none twice."""  # noqa: D205, D209
    key = ("outputs", part, run.recipe.batch_size)
    return reuse(run, key, lambda: _outputs_by_index(run, part))


def _outputs_by_index(run: Run, part: Part) -> IndexedOutputs:
    head, device = run.model.head, run.ranks.device
    index = [torch.empty(0, dtype=torch.int64, device=device)]
    kind = head.weight.dtype
    logits = [torch.empty(0, head.out_features, device=device, dtype=kind)]
    features = [torch.empty(0, head.in_features, device=device, dtype=kind)]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    columns = (index, logits, features, labels)
    with evaluating(run.model), torch.no_grad():
        for batch in batches(run, part, "outputs", Rows(columns)):
            with run.precision.autocast(device):
                output = run.model(batch.images)
            index.append(batch.index)
            logits.append(output.logits.to(kind))
            features.append(output.features.to(kind))
            labels.append(batch.labels)
    return IndexedOutputs(*(torch.cat(column) for column in columns))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, the mode it had afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _rows(layer: nn.Module, images: Tensor | None) -> Any:
    """The inputs of a layer as (rows, D) float64; without inputs, D."""
    if not reads_rows(layer):
        raise TypeError(f"got a {type(layer).__name__}; expected a linear or ungrouped convolution")
    if isinstance(layer, nn.Linear):
        return layer.in_features if images is None else images.flatten(0, -2).double()
    assert isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str)
    if images is None:
        return layer.weight.shape[1:].numel()
    size = (layer.kernel_size[0], layer.kernel_size[1])
    patches = F.unfold(images.double(), size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def reads_rows(layer: nn.Module) -> bool:
    """Whether `input_covariances` knows the rows of a layer: linear, or ungrouped convolution."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _key(loss: Loss) -> object:
    """The same for the same function, its options included; a closure is only ever itself."""
    if isinstance(loss, partial) and not loss.args:
        return (_key(loss.func), *sorted(loss.keywords.items()))
    if isinstance(loss, FunctionType) and loss.__closure__ is None:
        return (loss.__module__, loss.__qualname__)
    return loss  # kept in the key, so that no other object can take its identity


def _moving(run: Run, by: str = "batch") -> tuple[object, ...]:
    """What a sum of gradients depends on beside weights and samples: parameters, and batches.

    Samples' own gradients are computed by chunks, which batches of whole chunks do not change.
    """
    step = -(-run.recipe.batch_size // run.ranks.world)
    whole = by == "sample" and step % CHUNK == 0
    return tuple(run.named_parameters), CHUNK if whole else run.recipe.batch_size


def reuse(run: Run, what: tuple[object, ...], compute: Callable[[], T]) -> T:
    """`compute()`, or what another run computed of the same weights, samples and `what`."""
    if run.shared is None:
        return compute()
    images = getattr(run.loader, "images", run.loader)
    forget = hashlib.sha256(run.forget.cpu().numpy().tobytes()).hexdigest()
    key = (what, weights_digest(run.model), run.model.preset, forget, run.precision, images)
    if key not in run.shared:
        run.shared[key] = compute()
    return cast(T, run.shared[key])
