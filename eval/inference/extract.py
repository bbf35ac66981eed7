"""One inference pass over one image set: what every metric of this package is computed from.

Every sample is read once, by one rank, in evaluation mode, and stands at its own place in the
result, so accuracies are exact sums over exact counts and two models' rows can be compared.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks, agree, gather_rows
from letheon.engine.precision import Precision
from letheon.errors import InputError
from letheon.eval.inference.taps import record_taps
from letheon.eval.outputs import Outputs
from letheon.loaders.batch import Batch, Loader

Parts = Generator[dict[str, Tensor], None, None]
"""One rank's part of a pass, column by column, in parts."""
_HELD_BYTES = 256 * 2**20  # on the device, before a part of the results is moved to the host


@dataclass(frozen=True)
class InferenceOptions:
    """What an inference pass computes, besides the model and the images."""

    indices: tuple[int, ...] | None = None
    """Samples to read; None for all. A sample named twice is read once."""
    precision: Precision = Precision("fp32")
    """Of the network; outputs are float32 whatever it is."""
    taps: tuple[str, ...] = ()
    """Modules whose output is kept too, averaged over positions."""
    flip: bool = False
    """Average logits and features with the mirror image's; taps are the image's own."""

    @property
    def unique_indices(self) -> list[int] | None:
        """The samples to read, increasing, each once; None for all."""
        return None if self.indices is None else sorted({int(i) for i in self.indices})


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Hold evaluation mode inside; afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def read_answers(
    model: nn.Module, loader: Loader, device: torch.device, options: InferenceOptions
) -> Parts:
    """Run this rank's part of a pass; results come on the host, by at most about 256 MiB.

    Yields:
        Columns by the names of `columns`, all with the same rows.
    """
    options = replace(options, precision=options.precision.resolve(device))
    waiting: list[dict[str, Tensor]] = []
    held = 0
    with evaluation_mode(model), record_taps(model, options.taps) as taps:
        for batch in loader.sweep(options.unique_indices):
            waiting.append(_answer(model, taps, batch.to(device), options))
            held += sum(values.nbytes for values in waiting[-1].values())
            if held > _HELD_BYTES:
                yield _on_host(waiting)
                waiting, held = [], 0
    if waiting:
        yield _on_host(waiting)


def _answer(
    model: nn.Module, taps: dict[str, Tensor], batch: Batch, options: InferenceOptions
) -> dict[str, Tensor]:
    with options.precision.autocast(batch.images.device):
        mirror = model(batch.images.flip(3)) if options.flip else None
        logits, features = model(batch.images)  # last, so that the taps are its
    if mirror is not None:
        logits = (logits.float() + mirror.logits.float()) / 2
        features = (features.float() + mirror.features.float()) / 2
    rows = {"features": features.float(), "logits": logits.float()}
    rows |= {f"tap {name}": taps[name] for name in options.taps}
    return rows | {"labels": batch.labels, "forget": batch.forget, "index": batch.index}


@torch.no_grad()
def read_together(
    models: Sequence[nn.Module],
    loader: Loader,
    device: torch.device,
    options: Sequence[InferenceOptions],
) -> list[Parts]:
    """Compute what `read_answers` gives of each model, from one reading of the images.

    The options of all models name the same samples. The parts of all models are held on the host,
    until they are taken. An image that cannot be read raises its error where its part would come.
    """
    options = [replace(each, precision=each.precision.resolve(device)) for each in options]
    held: list[list[dict[str, Tensor]]] = [[] for _ in models]
    problem = None
    with ExitStack() as stack:
        try:
            taps = []
            for model, each in zip(models, options, strict=True):
                stack.enter_context(evaluation_mode(model))
                taps.append(stack.enter_context(record_taps(model, each.taps)))
            for batch in loader.sweep(options[0].unique_indices):
                on_device = batch.to(device)
                for number, model in enumerate(models):
                    answer = _answer(model, taps[number], on_device, options[number])
                    held[number].append(_on_host([answer]))
        except InputError as error:
            problem = error
    return [_replay(parts, problem) for parts in held]


def _replay(parts: list[dict[str, Tensor]], problem: InputError | None) -> Parts:
    parts.reverse()
    while parts:
        yield parts.pop()
    if problem is not None:
        raise problem


def _on_host(waiting: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([rows[name] for rows in waiting]).cpu() for name in waiting[0]}


def columns(taps: Sequence[str]) -> dict[str, torch.dtype]:
    """Name the columns of a pass: name -> dtype; floats are two-dimensional, the others one-."""
    floats = ("features", "logits", *(f"tap {name}" for name in taps))
    return dict.fromkeys(floats, torch.float32) | {
        "labels": torch.int64,
        "forget": torch.bool,
        "index": torch.int64,
    }


def widths(part: dict[str, Tensor] | None, taps: Sequence[str], ranks: Ranks) -> dict[str, int]:
    """Find each float column's width, also where a rank read nothing; every rank must call."""
    floats = [name for name, dtype in columns(taps).items() if dtype == torch.float32]
    own = [part[name].shape[1] if part is not None else 0 for name in floats]
    known = gather_rows(torch.tensor([own]), ranks).amax(dim=0)
    return dict(zip(floats, known.tolist(), strict=True))


def extract(
    model: nn.Module,
    loader: Loader,
    ranks: Ranks,
    options: InferenceOptions | None = None,
    parts: Parts | None = None,
) -> Outputs:
    """Run a model over a set once, under the test transform, shared out over the ranks.

    Args:
        model: a Classifier on `ranks.device`; its forward gives (logits, features). Its modes are
            restored.
        loader: this rank's; `sweep` is read.
        ranks: the job; every rank must call.
        options: samples, precision, taps, flip.
        parts: this rank's part of the pass, by `read_together`; else it is computed.

    Returns:
        Outputs in sample-index order, bitwise equal on every rank.

    Raises:
        InputError: a tap that is no module, or (on every rank) an image that cannot be read.
    """
    options = options or InferenceOptions()
    taken: list[dict[str, Tensor]] = []
    problem = None
    try:
        taken.extend(parts or read_answers(model, loader, ranks.device, options))
    except InputError as error:  # an image one rank cannot read: the others must not wait
        problem = str(error)
    agree(ranks, problem)
    wide = widths(taken[0] if taken else None, options.taps, ranks)
    whole: dict[str, Tensor] = {}
    for name, dtype in columns(options.taps).items():
        empty = torch.zeros((0, wide[name]) if name in wide else 0, dtype=dtype)
        whole[name] = gather_rows(torch.cat([part.pop(name) for part in taken] or [empty]), ranks)
    order = whole["index"].argsort()
    outputs = assemble({name: values[order] for name, values in whole.items()}, options.taps)
    check_complete(outputs.index, options.unique_indices)
    return outputs


def assemble(whole: dict[str, Tensor], taps: Sequence[str]) -> Outputs:
    """Make Outputs of columns over all ranks, in sample-index order."""
    floats = (whole["features"], whole["logits"])
    pooled = {name: whole[f"tap {name}"] for name in taps}
    return Outputs(*floats, whole["labels"], whole["forget"], whole["index"], pooled)


def check_complete(index: Tensor, indices: Sequence[int] | None) -> None:
    """Check that every sample came once: 0, 1, 2, ... or these rows."""
    numbers = range(len(index)) if indices is None else indices
    expected = torch.tensor(list(numbers), dtype=torch.int64)
    assert torch.equal(index, expected), "a sweep left samples out, or gave some twice"
