"""One inference pass over one image set: what every metric of this package is computed from.

Every sample is read once, by one rank, in evaluation mode, and stands at its own place in the
result, so accuracies are exact sums over exact counts and two models' rows can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks, agree, gather_rows
from letheon.engine.precision import Precision
from letheon.loaders.batch import Loader
from letheon.loaders.errors import InputError

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


def pooled(activation: Tensor) -> Tensor:
    """(B, width) float32: the mean over positions of a layer's output.

    Reads (B, C, H, W) maps, (B, T, C) tokens and (B, H, W, C) maps; the last are told from the
    first by which two sizes are equal, since every preset's input is square.
    """
    if activation.ndim == 4:
        _, first, second, third = activation.shape
        channels_end = first == second and second != third
        return activation.float().mean(dim=(1, 2) if channels_end else (2, 3))
    if activation.ndim == 3:
        return activation.float().mean(dim=1)
    return activation.float().flatten(1)


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


@contextmanager
def tapped(model: nn.Module, taps: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after each forward pass, the pooled output of each named module.

    Raises:
        InputError: a tap that is no module of the model.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in taps if name not in modules or name == ""]
    if unknown:
        known = ", ".join(name for name in modules if name)
        raise InputError(f"got tap {unknown[0]!r}; this model has {known}")
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[name] = pooled(output)

        return hook

    handles = [modules[name].register_forward_hook(record(name)) for name in taps]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Columns:
    """Rows of several named tensors, collected on the device and moved to the host in parts."""

    def __init__(self) -> None:
        self.waiting: list[dict[str, Tensor]] = []
        self.bytes = 0
        self.parts: list[dict[str, Tensor]] = []

    def add(self, rows: dict[str, Tensor]) -> None:
        self.waiting.append(rows)
        self.bytes += sum(values.nbytes for values in rows.values())
        if self.bytes > _HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            names = self.waiting[0]
            joined = {name: torch.cat([rows[name] for rows in self.waiting]) for name in names}
            self.parts.append({name: values.cpu() for name, values in joined.items()})
        self.waiting, self.bytes = [], 0

    def gathered(self, name: str, like: Tensor, ranks: Ranks) -> Tensor:
        """The column over all ranks; `like` gives a rank without rows its trailing shape."""
        own = torch.cat([part.pop(name) for part in self.parts]) if self.parts else like
        return gather_rows(own, ranks)


@torch.no_grad()
def extract(
    model: nn.Module,
    loader: Loader,
    ranks: Ranks,
    indices: Sequence[int] | None = None,
    device: torch.device | None = None,
    precision: Precision | None = None,
    taps: Sequence[str] = (),
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

    Returns:
        Outputs in sample-index order, bitwise equal on every rank.

    Raises:
        InputError: a tap that is no module, or (on every rank) an image that cannot be read.
    """
    device = device or ranks.device
    precision = (precision or Precision("fp32")).resolved(device)
    wanted = None if indices is None else sorted({int(i) for i in indices})
    columns, problem = _Columns(), None
    with evaluating(model), tapped(model, taps) as seen:
        try:
            for batch in loader.sweep(wanted):
                on_device = batch.to(device)
                with precision.autocast(device):
                    logits, features = model(on_device.images)
                rows = {f"tap {name}": values for name, values in seen.items()}
                rows |= {"features": features.float(), "logits": logits.float()}
                rows |= {"labels": on_device.labels, "forget": on_device.forget}
                columns.add(rows | {"index": on_device.index})
        except InputError as error:  # an image one rank cannot read: the others must not wait
            problem = str(error)
    agree(ranks, problem)
    columns.flush()
    return _assembled(columns, wanted, taps, ranks)


def _assembled(
    columns: _Columns, wanted: list[int] | None, taps: Sequence[str], ranks: Ranks
) -> Outputs:
    """The gathered columns in sample-index order, each index checked to have come once."""
    floats = ["features", "logits", *(f"tap {name}" for name in taps)]
    own = [columns.parts[0][name].shape[1] if columns.parts else 0 for name in floats]
    widths = gather_rows(torch.tensor([own]), ranks).amax(0).tolist()
    index = columns.gathered("index", torch.zeros(0, dtype=torch.int64), ranks)
    index, order = index.sort()
    asked = torch.tensor(list(range(len(index))) if wanted is None else wanted, dtype=torch.int64)
    assert torch.equal(index, asked), "a sweep left samples out, or gave some twice"
    named = {
        name: columns.gathered(name, torch.zeros(0, width), ranks)[order]
        for name, width in zip(floats, widths, strict=True)
    }
    labels = columns.gathered("labels", torch.zeros(0, dtype=torch.int64), ranks)[order]
    forget = columns.gathered("forget", torch.zeros(0, dtype=torch.bool), ranks)[order]
    return Outputs(
        named["features"],
        named["logits"],
        labels,
        forget,
        index,
        {name: named[f"tap {name}"] for name in taps},
    )
