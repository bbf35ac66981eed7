"""Which layers of a network to compare, and CKA of all of them between several models at once.

One sweep runs every model on the same batches; only covariances are kept, so the set may be of any
size, and all pairs of models share one product a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks, agree, gather_rows, sum_over_ranks
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.errors import InputError
from letheon.eval.inference.extract import evaluating
from letheon.eval.inference.taps import tapped
from letheon.kernels.moments import Moments
from letheon.loaders.batch import Loader

_ROWS = 512  # samples held before they are added


class LayerCka(NamedTuple):
    """One layer of two models; None where a side is constant over the images."""

    value: float | None  # exact over the whole set, biased
    floor: float | None  # its mean over all shufflings of one side's rows


def stages(model: Classifier) -> tuple[str, ...]:
    """Names of the network's stages, in order, without the head: taps for `extract`.

    They are its children but for batch norms; where there are fewer than four, the largest one is
    replaced by its own children (ConvNeXt, Swin and ViT keep their stages in one container).
    """
    found = _children("net", model.net, model.head_path)
    while len(found) < 4:
        sizes = [sum(p.numel() for p in part.parameters()) for _, part in found]
        largest = sizes.index(max(sizes))
        inner = _children(*found[largest], model.head_path)
        if not inner:
            break
        found[largest : largest + 1] = inner
    return tuple(name for name, _ in found)


def _children(name: str, module: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Children with parameters, by full name, but for the one that is or holds the head."""
    found: list[tuple[str, nn.Module]] = []
    for child, part in module.named_children():
        inner = f"{name}.{child}"
        plain = isinstance(part, nn.BatchNorm2d) or not any(True for _ in part.parameters())
        if plain or f"net.{head}.".startswith(f"{inner}."):
            continue
        # A ModuleList is not called itself, so it has no output to read.
        listed = isinstance(part, nn.ModuleList)
        found += _children(inner, part, head) if listed else [(inner, part)]
    return found


def convolutions(model: Classifier) -> tuple[str, ...]:
    """Names of every convolution, in order."""
    return tuple(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))


@torch.no_grad()
def layer_cka(
    models: Mapping[str, Classifier],
    loader: Loader,
    ranks: Ranks,
    taps: Sequence[str],
    indices: Sequence[int] | None = None,
    precision: Precision | None = None,
    products: torch.dtype = torch.float64,
) -> dict[tuple[str, str], dict[str, LayerCka]]:
    """Exact linear CKA of each tapped layer, averaged over positions, for each pair of models.

    Memory: for a layer of width d and m models (m d)^2 float64 numbers.

    Args:
        models: name -> network on `ranks.device`; all of one architecture. Modes are restored.
        loader: this rank's; `sweep` is read once, and every model sees each batch.
        ranks: the job; every rank must call.
        taps: names of modules, as `stages` gives them.
        indices: samples to read; default all.
        precision: of the networks; default float32.
        products: of the covariances; float32 where float64 is slow (see `Moments`).

    Returns:
        (first, second) in the order of `models` -> tap -> value, the same on every rank.

    Raises:
        InputError: an unknown tap, features that are not finite (naming the layer), or an image
            that cannot be read; on every rank.
    """
    names = list(models)
    precision = (precision or Precision("fp32")).resolve(ranks.device)
    sums: dict[str, Moments] = {}
    held: list[dict[str, list[Tensor]]] = []  # a batch: tap -> a block a model
    rows, problem = 0, None
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        seen = [stack.enter_context(tapped(model, taps)) for model in models.values()]
        try:
            for batch in loader.sweep(indices):
                images = batch.images.to(ranks.device, non_blocking=True)
                with precision.autocast(ranks.device):
                    for model in models.values():
                        model(images)
                held.append({tap: [activations[tap] for activations in seen] for tap in taps})
                rows += len(images)
                if rows >= _ROWS:
                    _add(sums, held, taps, products)
                    held, rows = [], 0
        except InputError as error:  # an image one rank cannot read: the others must not wait
            problem = str(error)
    agree(ranks, problem)
    _add(sums, held, taps, products)
    widths = _widths(sums, taps, len(names), ranks)
    result: dict[tuple[str, str], dict[str, LayerCka]] = {
        (a, b): {} for i, a in enumerate(names) for b in names[i + 1 :]
    }
    for tap, width in zip(taps, widths, strict=True):
        total = sums.get(tap) or Moments(width, ranks.device, products=products)
        sum_over_ranks(_unshifted(total), ranks)
        for i, a in enumerate(names):
            for j in range(i + 1, len(names)):
                result[a, names[j]][tap] = _read(total, i, j, f"{tap} of {a} or {names[j]}")
    return result


def _add(
    sums: dict[str, Moments],
    held: Sequence[dict[str, list[Tensor]]],
    taps: Sequence[str],
    products: torch.dtype,
) -> None:
    """Add the held batches: many rows at once, for each product reads and writes all its sums."""
    for tap in taps if held else ():
        blocks = [torch.cat(parts) for parts in zip(*(batch[tap] for batch in held), strict=True)]
        if tap not in sums:
            sums[tap] = _started(blocks, products)
        sums[tap].add(*blocks)


def _started(blocks: Sequence[Tensor], products: torch.dtype) -> Moments:
    """Sums about the first batch's mean, where the spread keeps its digits."""
    shift = torch.cat([block.double().mean(dim=0) for block in blocks])
    return Moments([block.shape[1] for block in blocks], shift.device, shift, products)


def _widths(
    sums: Mapping[str, Moments], taps: Sequence[str], models: int, ranks: Ranks
) -> list[list[int]]:
    """Feature widths of each tap, also on a rank that read nothing."""
    own = [list(sums[tap].widths) if tap in sums else [0] * models for tap in taps]
    known = gather_rows(torch.tensor(own, device=ranks.device)[None], ranks).amax(dim=0)
    return [[int(width) for width in row] for row in known]


def _unshifted(total: Moments) -> list[Tensor]:
    """The sums about zero in place: each rank had its own shift, and they are to be added."""
    if total.shift is not None:
        shift = total.shift
        total.outer.addr_(total.sums, shift)
        total.outer.addr_(shift, total.sums + total.count * shift)
        total.sums += total.count * shift
        total.shift = None
    return total.tensors()


def _read(total: Moments, i: int, j: int, name: str) -> LayerCka:
    if not bool(total.sums.isfinite().all()):
        raise InputError(
            f"got NaN or infinite features in {name}; expected numbers; the model has diverged"
        )
    value = float(total.cka(i, j))
    if value != value:  # NaN: a side does not vary
        return LayerCka(None, None)
    n, floor = float(total.count), 1.0
    for block in (i, j):
        start = sum(total.widths[:block])
        own = slice(start, start + total.widths[block])
        spread = total.outer[own, own] - torch.outer(total.sums[own], total.sums[own]) / n
        floor *= float(spread.trace() / torch.linalg.matrix_norm(spread))
    return LayerCka(value, floor / (n - 1))
