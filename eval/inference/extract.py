"""One inference pass over one image set: what every metric of this package is computed from.

Every sample is read once, by one rank, in evaluation mode, and stays there at its own place, so
accuracies are exact sums over exact counts and two models' rows can be compared. A rank's memory
falls with the number of ranks: it holds its share of the set, once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from letheon.engine.distributed import Ranks, agree, gather_rows
from letheon.engine.memory.shards import keep_pace
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.engine.runs.stop import GO_ON
from letheon.errors import InputError
from letheon.eval.inference.part_saver import PartSaver
from letheon.eval.inference.taps import record_taps
from letheon.eval.outputs import Outputs
from letheon.loaders.batch import Batch, Loader
from letheon.loaders.order import share

Parts = Generator[dict[str, Tensor], None, None]
"""One rank's part of a pass, column by column, in parts."""
_HELD_BYTES = 64 * 2**20  # on a device, before a part of the results is moved to the host


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
    shift: bool = False
    """Give half the weight to the image moved by a pixel, up and left or down and right; the edge
    is filled by its mirror image. With `flip`, each of the three is averaged with its mirror."""

    @property
    def unique_indices(self) -> list[int] | None:
        """The samples to read, increasing, each once; None for all."""
        return None if self.indices is None else sorted({int(i) for i in self.indices})

    @property
    def passes(self) -> int:
        """Forward passes of a batch."""
        return (3 if self.shift else 1) * (2 if self.flip else 1)


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


class Part(NamedTuple):
    """What some batches of a pass have given, on the host."""

    total: int  # samples of the whole pass, over all ranks
    columns: dict[int, dict[str, Tensor]]  # number of the model -> columns, by the names of these


@torch.no_grad()
def _read_parts(
    models: Sequence[Classifier],
    loader: Loader,
    device: torch.device,
    options: Sequence[InferenceOptions],
    saver: PartSaver | None,
) -> Iterator[Part]:
    """Run this rank's part of a pass of several models, by about 64 MiB of answers or less.

    With a saver what it has is yielded first, and these batches are not read.
    """
    options = [replace(each, precision=each.precision.resolve(device)) for each in options]
    positions = [0] * len(models)  # first batch that a model answers
    with ExitStack() as stack:
        if saver is not None:
            stack.enter_context(saver.hold_signals())
            for number in range(len(models)):
                for count, columns in saver.load(number):
                    yield Part(count, {number: columns})
            positions = [*saver.positions]
        taps = []
        for model, each in zip(models, options, strict=True):
            stack.enter_context(evaluation_mode(model))
            taps.append(stack.enter_context(record_taps(model, each.taps)))
        waiting: dict[int, list[dict[str, Tensor]]] = {}
        held, total, batch_number = 0, 0, min(positions)
        own = loader.sweep(options[0].unique_indices, batch_number)
        for batch in keep_pace(models, own, options[0].passes):
            batch_number += 1
            on_device, total = batch.to(device), batch.total
            for number, model in enumerate(models):
                if batch_number > positions[number]:
                    answer = _answer(model, taps[number], on_device, options[number])
                    waiting.setdefault(number, []).append(answer)
                    held += sum(values.nbytes for values in answer.values())
            word = GO_ON if saver is None else saver.count_batch()
            if held > _HELD_BYTES or word != GO_ON:
                part = Part(total, {n: _on_host(rows) for n, rows in waiting.items()})
                waiting, held = {}, 0
                if saver is not None:
                    saver.save(part.columns, batch_number, total, word)
                yield part
        part = Part(total, {n: _on_host(rows) for n, rows in waiting.items()})
        if saver is not None:
            saver.close(part.columns, batch_number, total)
        if part.columns:
            yield part


def read_answers(
    model: Classifier,
    loader: Loader,
    device: torch.device,
    options: InferenceOptions,
    saver: PartSaver | None = None,
) -> Parts:
    """Run this rank's part of a pass; results come on the host, by at most about 64 MiB.

    Yields:
        Columns by the names of `columns`, all with the same rows.
    """
    for part in _read_parts([model], loader, device, [options], saver):
        yield part.columns[0]


def _answer(
    model: nn.Module, taps: dict[str, Tensor], batch: Batch, options: InferenceOptions
) -> dict[str, Tensor]:
    moved = _move(batch.images) if options.shift else []
    with options.precision.autocast(batch.images.device):
        others = [_show(model, images, options.flip) for images in moved]
        logits, features = _show(model, batch.images, options.flip)  # last: the taps are its
    if others:
        (down_logits, down_features), (up_logits, up_features) = others
        logits = logits / 2 + (down_logits + up_logits) / 4
        features = features / 2 + (down_features + up_features) / 4
    rows = {"features": features, "logits": logits}
    rows |= {f"tap {name}": taps[name] for name in options.taps}
    return rows | {"labels": batch.labels, "forget": batch.forget, "index": batch.index}


def _show(model: nn.Module, images: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    """Logits and features in float32; with `flip` their means with the mirror image's."""
    mirror = model(images.flip(3)) if flip else None
    logits, features = (part.float() for part in model(images))
    if mirror is None:
        return logits, features
    return (logits + mirror.logits.float()) / 2, (features + mirror.features.float()) / 2


def _move(images: Tensor) -> list[Tensor]:
    """(B, C, H, W) moved by one pixel, down and right, then up and left."""
    wide = F.pad(images, (1, 1, 1, 1), "reflect")
    return [wide[:, :, :-2, :-2], wide[:, :, 2:, 2:]]


class Rows:
    """This rank's rows of a pass: one buffer a column, of its final size, which parts fill."""

    def __init__(self) -> None:
        """Make no buffer yet: the first part tells the widths."""
        self.problem: InputError | None = None
        self._buffers: dict[str, Tensor] = {}
        self._filled = 0

    def add(self, part: dict[str, Tensor], size: int) -> None:
        """Write the rows of a part behind the others; `size` is how many all parts have."""
        stop = self._filled + len(part["index"])
        assert stop <= size, "a sweep gave a rank more than its share"
        for name, values in part.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty((size, *values.shape[1:]), dtype=values.dtype)
            self._buffers[name][self._filled : stop].copy_(values)
        self._filled = stop

    @property
    def columns(self) -> dict[str, Tensor]:
        """What was written, without a copy, by the names of `columns`; {} where nothing was."""
        return {name: values[: self._filled] for name, values in self._buffers.items()}

    def replay(self) -> Parts:
        """Give the rows as `read_answers` does, and its error where one came."""
        if self._filled:
            yield self.columns
        if self.problem is not None:
            raise self.problem


def read_together(
    models: Sequence[Classifier],
    loader: Loader,
    ranks: Ranks,
    options: Sequence[InferenceOptions],
    saver: PartSaver | None = None,
) -> list[Rows]:
    """Compute each model's answers to this rank's share of the images, which are read once.

    The options of all models name the same samples and the same passes. Every rank must call where
    a model is split over the ranks. An image that cannot be read is the `problem`
    of each.
    """
    rows = [Rows() for _ in models]
    try:
        for total, columns in _read_parts(models, loader, ranks.device, options, saver):
            place = share(total, ranks.rank, ranks.world)
            for number, part in columns.items():
                rows[number].add(part, place.stop - place.start)
    except InputError as error:
        for each in rows:
            each.problem = error
    return rows


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
    model: Classifier,
    loader: Loader,
    ranks: Ranks,
    options: InferenceOptions | None = None,
    rows: Rows | None = None,
) -> Outputs:
    """Run a model over a set once, under the test transform, shared out over the ranks.

    Args:
        model: on `ranks.device`, or split over the ranks; its modes are restored.
        loader: this rank's; `sweep` is read.
        ranks: the job; every rank must call.
        options: samples, precision, taps, flip.
        rows: this rank's part of the pass, by `read_together`; else it is computed.

    Returns:
        This rank's share of the outputs, in sample-index order; a rank without samples has tables
        of 0 rows and the others' widths.

    Raises:
        InputError: a tap that is no module, or (on every rank) an image that cannot be read.
    """
    options = options or InferenceOptions()
    rows = rows or read_together([model], loader, ranks, [options])[0]
    agree(ranks, None if rows.problem is None else str(rows.problem))
    own = rows.columns
    wide = widths(own or None, options.taps, ranks)
    for name, dtype in columns(options.taps).items():
        shape = (0, wide[name]) if name in wide else (0,)
        own.setdefault(name, torch.zeros(shape, dtype=dtype))
    outputs = assemble(own, options.taps, ranks)
    check_complete(outputs, options.unique_indices)
    return outputs


def assemble(own: dict[str, Tensor], taps: Sequence[str], ranks: Ranks) -> Outputs:
    """Make Outputs of this rank's columns, in sample-index order."""
    floats = (own["features"], own["logits"])
    pooled = {name: own[f"tap {name}"] for name in taps}
    return Outputs(*floats, own["labels"], own["forget"], own["index"], pooled, ranks)


def check_complete(outputs: Outputs, indices: Sequence[int] | None) -> None:
    """Check that every sample came once: 0, 1, 2, ... or these; every rank must call."""
    start, total = outputs.span()
    numbers = range(total) if indices is None else indices
    expected = torch.tensor(list(numbers[start : start + len(outputs)]), dtype=torch.int64)
    whole = total == len(numbers) and torch.equal(outputs.index, expected)
    assert whole, "a sweep left samples out, or gave some twice"
