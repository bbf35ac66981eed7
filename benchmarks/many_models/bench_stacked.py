"""Small networks stacked into one computation, beside the same networks one by one.

    cd benchmarks && python -m many_models.bench_stacked --out results/stacked_cpu.csv

A step of each of K networks on a batch of its own, forward, backward and SGD with momentum, by

- one by one: the engine's step, as `letheon oracles` takes it;
- plain one by one: the same in a few lines of torch, so that what the engine adds is seen;
- vmap: `torch.func.stack_module_state`, one `vmap` over the networks;
- grouped: convolutions of K groups and batch-norms of K times the channels, written by hand;
- products: convolutions as batched products of unfolded images, written by hand.

All ways start from the same weights and see the same images; after two steps their weights are
compared ("difference": the largest, over the largest weight). Rates are images of all networks a
second of the processor, on one thread, the ways taking turns.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import tyro
from harness import Results, row
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks
from letheon.engine.method import Run
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.step import assemble
from letheon.loaders.batch import Batch
from letheon.methods.train import Train

LR, MOMENTUM = 0.05, 0.9
RECIPE = Recipe(epochs=1, lr=LR, momentum=MOMENTUM, weight_decay=0.0)
Way = tuple[Callable[[], object], Callable[[], list[Tensor]]]
"""A step of all networks, and their weights after it, each of K networks in one tensor."""


@dataclass(frozen=True)
class Options:
    """What to time."""

    out: Path | None = None
    """CSV file to write; printed only, if not given"""
    counts: tuple[int, ...] = (8, 32)
    """networks"""
    batch: int = 128
    repeats: int = 7
    classes: int = 10
    size: int = 16
    """pixels; the digits have 16"""


def batches(options: Options, count: int) -> list[Batch]:
    """A batch of noise for each network, channels-last."""
    torch.manual_seed(0)
    n = options.batch
    none = torch.zeros(n, dtype=torch.bool)
    return [
        Batch(
            torch.randn(n, 3, options.size, options.size).to(memory_format=torch.channels_last),
            torch.randint(0, options.classes, (n,)), none, torch.arange(n), n,
        )
        for _ in range(count)
    ]  # fmt: skip


def stack_weights(models: Sequence[nn.Module]) -> list[Tensor]:
    """The weights of all networks, one tensor of K for each."""
    each = zip(*(model.parameters() for model in models), strict=True)
    return [torch.stack([one.detach() for one in same]) for same in each]


def engine_way(models: Sequence[Classifier], data: Sequence[Batch]) -> Way:
    """One by one, by the engine's step."""
    method, steps = Train(RECIPE), []
    for model, batch in zip(models, data, strict=True):
        run = Run(
            model, cast(Any, None), RECIPE, Ranks(device=torch.device("cpu")), 0, batch.forget, (),
            Precision("fp32"),
        )  # fmt: skip
        run.precision.apply(model, run.ranks.device)
        state = method.prepare(run) or State()
        step = assemble(method, run, state)
        model.train()
        steps.append((step, method.phases(run, state, 0)[-1], batch))

    def take() -> None:
        for step, phase, batch in steps:
            step.take(phase, batch, LR)

    return take, lambda: stack_weights(models)


def plain_way(models: Sequence[nn.Module], data: Sequence[Batch]) -> Way:
    """One by one, in a few lines."""
    optimizers = []
    for model in models:
        model.to(memory_format=torch.channels_last).train()
        optimizers.append(torch.optim.SGD(model.parameters(), LR, MOMENTUM, fused=True))

    def take() -> None:
        for model, optimizer, batch in zip(models, optimizers, data, strict=True):
            F.cross_entropy(model(batch.images).logits, batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return take, lambda: stack_weights(models)


def vmap_way(models: Sequence[nn.Module], data: Sequence[Batch]) -> Way:
    """All at once by torch.func."""
    for model in models:
        model.train()
    weights, buffers = stack_module_state(list(models))
    base = copy.deepcopy(models[0]).to("meta")
    images = torch.stack([batch.images for batch in data])
    labels = torch.stack([batch.labels for batch in data])
    optimizer = torch.optim.SGD(weights.values(), LR, MOMENTUM, fused=True)

    def loss(own: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(base, (own, rest), (x,)).logits, y)

    def take() -> None:
        vmap(loss)(weights, buffers, images, labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return take, lambda: [one.detach().clone() for one in weights.values()]


def hand_way(models: Sequence[Classifier], data: Sequence[Batch], grouped: bool) -> Way:
    """All at once by hand, for the network `small`: grouped convolutions, or batched products."""
    count = len(models)
    weights = [one.requires_grad_() for one in stack_weights(models)]
    images = torch.stack([batch.images for batch in data])  # (K, B, 3, H, W)
    labels = torch.cat([batch.labels for batch in data])
    optimizer = torch.optim.SGD(weights, LR, MOMENTUM, fused=True)
    running = {
        c: (torch.zeros(count * c), torch.ones(count * c)) for c in (32, 64)
    }  # moved as batch-norm moves them

    def conv_groups(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight.flatten(0, 1), padding=1, groups=count)

    def conv_products(x: Tensor, weight: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        columns = F.unfold(x.view(batch * count, -1, height, width), 3, padding=1)
        columns = columns.view(batch, count, -1, height * width).permute(1, 2, 0, 3)
        out = torch.bmm(weight.flatten(2), columns.reshape(count, columns.shape[1], -1))
        out = out.view(count, -1, batch, height * width).permute(2, 0, 1, 3)
        return out.reshape(batch, -1, height, width)

    conv = conv_groups if grouped else conv_products

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        mean, var = running[scale.shape[1]]
        return F.batch_norm(x, mean, var, scale.flatten(), shift.flatten(), True)

    def take() -> None:
        x = images.transpose(0, 1).flatten(1, 2)  # (B, K x 3, H, W)
        if grouped:
            x = x.contiguous(memory_format=torch.channels_last)
        for layer in range(4):
            weight, scale, shift = weights[3 * layer : 3 * layer + 3]
            x = F.relu(norm(conv(x, weight), scale, shift))
            if layer in (0, 2):
                x = F.max_pool2d(x, 2)
        features = x.mean((2, 3)).view(len(x), count, -1).transpose(0, 1)  # (K, B, 64)
        logits = torch.baddbmm(weights[13][:, None], features, weights[12].transpose(1, 2))
        (F.cross_entropy(logits.flatten(0, 1), labels) * count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return take, lambda: [one.detach().clone() for one in weights]


def ways(options: Options, count: int) -> Iterator[tuple[str, Way]]:
    """Each way with networks of its own, all of the same weights."""

    def models() -> list[Classifier]:
        return [build("small", options.classes, seed) for seed in range(count)]

    data = batches(options, count)
    yield "one by one", engine_way(models(), data)
    yield "plain one by one", plain_way(models(), data)
    yield "vmap", vmap_way(models(), data)
    yield "grouped", hand_way(models(), data, True)
    yield "products", hand_way(models(), data, False)


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest difference of two networks' weights, over the largest weight."""
    largest = max(float(one.abs().max()) for one in left)
    pairs = zip(left, right, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


def main(options: Options) -> None:
    """Time each number of networks."""
    torch.set_num_threads(1)
    results = Results(options.out)
    for count in options.counts:
        x = f"small {options.size}px b{options.batch}, {count} networks"

        def entry(way: str, values: list[float], metric: str, unit: str, x: str = x) -> None:
            results.add([row("stacked", way, values, metric=metric, unit=unit, mode="step", x=x,
                             device="cpu")])  # fmt: skip

        every = dict(ways(options, count))
        for take, _ in every.values():
            take()
            take()
        weights = {name: read() for name, (_, read) in every.items()}
        rates: dict[str, list[float]] = {name: [] for name in every}
        for _ in range(options.repeats):
            for name, (take, _) in every.items():
                start = time.process_time()
                take()
                rates[name].append(count * options.batch / (time.process_time() - start))
        for name, values in rates.items():
            entry(name, values, "rate, processor", "images/s")
            ratios = [a / b for a, b in zip(values, rates["one by one"], strict=True)]
            entry(name, ratios, "ratio over one by one", "x")
            entry(name, [difference(weights["one by one"], weights[name])], "difference", "share")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
