"""One inference pass over one image set: what every metric of this package is computed from.

Every sample is read once, by one rank, in evaluation mode, and stands at its own place in the
result, so accuracies are exact sums over exact counts and two models' rows can be compared.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks, agree, gather_rows
from letheon.engine.precision import Precision
from letheon.errors import InputError
from letheon.eval.inference.taps import tapped
from letheon.loaders.batch import Batch, Loader

_HELD_BYTES = 256 * 2**20  # on the device, before a part of the results is moved to the host


@dataclass(frozen=True)
class Outputs:
    """One model's answers to one image set, in sample-index order, on the CPU.

    The same on every rank. Letters: n samples, D features, C classes.
    """

    features: Tensor  # (n, D) float32, the input of the last linear layer
    logits: Tensor  # (n, C) float32
    labels: Tensor  # (n,) int64
    forget: Tensor  # (n,) bool
    index: Tensor  # (n,) int64, strictly increasing
    taps: dict[str, Tensor] = field(default_factory=dict)  # name -> (n, width) float32, pooled

    def __len__(self) -> int:
        return len(self.index)

    def where(self, rows: Tensor) -> Outputs:
        """The samples chosen by `rows`: (n,) bool or (m,) increasing positions."""
        taps = {name: values[rows] for name, values in self.taps.items()}
        return Outputs(
            self.features[rows],
            self.logits[rows],
            self.labels[rows],
            self.forget[rows],
            self.index[rows],
            taps,
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def answers(
    model: nn.Module,
    loader: Loader,
    device: torch.device,
    indices: Sequence[int] | None = None,
    precision: Precision | None = None,
    taps: Sequence[str] = (),
    flip: bool = False,
) -> Generator[dict[str, Tensor], None, None]:
    """This rank's part of a pass, on the host, in parts of at most about 256 MiB.

    Yields:
        Columns by the names of `columns`, all with the same rows.
    """
    precision = (precision or Precision("fp32")).resolve(device)
    waiting: list[dict[str, Tensor]] = []
    held = 0
    with evaluating(model), tapped(model, taps) as seen:
        for batch in loader.sweep(indices):
            waiting.append(_answer(model, seen, batch.to(device), precision, taps, flip))
            held += sum(values.nbytes for values in waiting[-1].values())
            if held > _HELD_BYTES:
                yield _on_host(waiting)
                waiting, held = [], 0
    if waiting:
        yield _on_host(waiting)


def _answer(
    model: nn.Module,
    seen: dict[str, Tensor],
    batch: Batch,
    precision: Precision,
    taps: Sequence[str],
    flip: bool,
) -> dict[str, Tensor]:
    with precision.autocast(batch.images.device):
        mirrored = model(batch.images.flip(3)) if flip else None
        logits, features = model(batch.images)  # last, so that the taps are its
    if mirrored is not None:
        logits = (logits.float() + mirrored.logits.float()) / 2
        features = (features.float() + mirrored.features.float()) / 2
    rows = {"features": features.float(), "logits": logits.float()}
    rows |= {f"tap {name}": seen[name] for name in taps}
    return rows | {"labels": batch.labels, "forget": batch.forget, "index": batch.index}


@torch.no_grad()
def answers_together(
    models: Sequence[nn.Module],
    loader: Loader,
    device: torch.device,
    indices: Sequence[int] | None,
    precision: Precision | None,
    taps: Sequence[Sequence[str]],
    flip: bool,
) -> list[Generator[dict[str, Tensor], None, None]]:
    """What `answers` gives of each model, from one reading of the images; `taps` are each model's.

    The parts of all models are held on the host, until they are taken. An image that cannot be read
    raises its error where its part would come.
    """
    precision = (precision or Precision("fp32")).resolve(device)
    held: list[list[dict[str, Tensor]]] = [[] for _ in models]
    problem = None
    with ExitStack() as stack:
        try:
            seen = []
            for model, names in zip(models, taps, strict=True):
                stack.enter_context(evaluating(model))
                seen.append(stack.enter_context(tapped(model, names)))
            for batch in loader.sweep(indices):
                there = batch.to(device)
                for number, model in enumerate(models):
                    found = _answer(model, seen[number], there, precision, taps[number], flip)
                    held[number].append(_on_host([found]))
        except InputError as error:
            problem = error
    return [_taken(parts, problem) for parts in held]


def _taken(
    parts: list[dict[str, Tensor]], problem: InputError | None
) -> Generator[dict[str, Tensor], None, None]:
    parts.reverse()
    while parts:
        yield parts.pop()
    if problem is not None:
        raise problem


def _on_host(waiting: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([rows[name] for rows in waiting]).cpu() for name in waiting[0]}


def columns(taps: Sequence[str]) -> dict[str, torch.dtype]:
    """What a pass yields: name -> dtype; float columns are two-dimensional, the others one-."""
    floats = ("features", "logits", *(f"tap {name}" for name in taps))
    return dict.fromkeys(floats, torch.float32) | {
        "labels": torch.int64,
        "forget": torch.bool,
        "index": torch.int64,
    }


def widths(part: dict[str, Tensor] | None, taps: Sequence[str], ranks: Ranks) -> dict[str, int]:
    """The width of each float column, also on a rank that read nothing; every rank must call."""
    floats = [name for name, dtype in columns(taps).items() if dtype == torch.float32]
    own = [part[name].shape[1] if part is not None else 0 for name in floats]
    known = gather_rows(torch.tensor([own]), ranks).amax(dim=0)
    return dict(zip(floats, known.tolist(), strict=True))


def extract(
    model: nn.Module,
    loader: Loader,
    ranks: Ranks,
    indices: Sequence[int] | None = None,
    device: torch.device | None = None,
    precision: Precision | None = None,
    taps: Sequence[str] = (),
    flip: bool = False,
    made: Generator[dict[str, Tensor], None, None] | None = None,
) -> Outputs:
    """Read `indices` (default: all) once, test transform, sharded over the ranks.

    Args:
        model: a Classifier; its forward gives (logits, features). Its modes are restored.
        loader: this rank's; `sweep` is read.
        ranks: the job; every rank must call.
        indices: samples to read; given twice is read once.
        device: default `ranks.device`; the model must be there.
        precision: default float32. Results are float32 whatever it is.
        taps: names of modules whose output is wanted too, averaged over positions.
        flip: logits and features are the mean of the image's and its mirror image's; taps are the
            image's own.
        made: this rank's part of the pass, by `answers_together`; else it is made here.

    Returns:
        Outputs in sample-index order, bitwise equal on every rank.

    Raises:
        InputError: a tap that is no module, or (on every rank) an image that cannot be read.
    """
    wanted = None if indices is None else sorted({int(i) for i in indices})
    parts: list[dict[str, Tensor]] = []
    problem = None
    try:
        device = device or ranks.device
        parts.extend(made or answers(model, loader, device, wanted, precision, taps, flip))
    except InputError as error:  # an image one rank cannot read: the others must not wait
        problem = str(error)
    agree(ranks, problem)
    wide = widths(parts[0] if parts else None, taps, ranks)
    found: dict[str, Tensor] = {}
    for name, dtype in columns(taps).items():
        empty = torch.zeros((0, wide[name]) if name in wide else 0, dtype=dtype)
        found[name] = gather_rows(torch.cat([part.pop(name) for part in parts] or [empty]), ranks)
    order = found["index"].argsort()
    result = assembled({name: values[order] for name, values in found.items()}, taps)
    check_complete(result.index, wanted)
    return result


def assembled(found: dict[str, Tensor], taps: Sequence[str]) -> Outputs:
    """Outputs from columns over all ranks, in sample-index order."""
    pooled = {name: found[f"tap {name}"] for name in taps}
    return Outputs(
        found["features"],
        found["logits"],
        found["labels"],
        found["forget"],
        found["index"],
        pooled,
    )


def check_complete(index: Tensor, wanted: Sequence[int] | None) -> None:
    """Every sample came once: 0, 1, 2, ... or those that were asked for."""
    asked = range(len(index)) if wanted is None else wanted
    expected = torch.tensor(list(asked), dtype=torch.int64)
    assert torch.equal(index, expected), "a sweep left samples out, or gave some twice"
