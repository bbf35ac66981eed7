"""What every loader delivers, whatever its backend, and what it must do.

The order of the samples, the augmentation and the composition of each global batch are functions of
(seed, epoch, sample index). They do not depend on the number of ranks, the workers or the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from letheon.errors import InputError

Reads = Literal["forget", "retain", "mixed", "paired"]
"""Which samples a phase reads.

- ``forget``, ``retain``: that part of the training set, each sample once an epoch.
- ``mixed``: both parts shuffled together, each sample once an epoch.
- ``paired``: a retain batch, each sample once an epoch, with a forget batch of the same size
  appended; the forget set is cycled, reshuffled at each turn.
"""


class Stream(NamedTuple):
    """One pass over an epoch's samples: which, in what batches, at what size, and how many."""

    reads: Reads
    batch_size: int | None = None  # samples of all ranks together; None: the loader's own
    image_size: int | None = None  # pixels, for this pass alone; None: the preset's
    share: float = 1.0  # read only the first ceil(share * steps) global batches of the epoch
    steps: int | None = None  # exactly so many global batches; a shorter stream begins anew
    retain_share: float = 1.0  # ``mixed`` alone: read only this share of the retain samples
    group: int = 0  # ranks read whole groups of so many samples, see `order.share`; 0: none

    @staticmethod
    def of(stream: Stream | Reads) -> Stream:
        """The stream, or the plain one of a bare name.

        Raises:
            InputError: Numbers out of range, or both `share` and `steps`.
        """
        if isinstance(stream, str):
            return Stream(stream)
        for what, number in (
            ("batch size", stream.batch_size),
            ("image size", stream.image_size),
            ("number of steps", stream.steps),
        ):
            if number is not None and number < 1:
                raise InputError(f"got a {what} of {number}, expected 1 or more; raise it")
        if not 0 < stream.share <= 1:
            raise InputError(
                f"got a share of {stream.share} of an epoch, expected more than 0 and at most 1; "
                "give such a number"
            )
        if stream.share < 1 and stream.steps is not None:
            raise InputError(
                f"got a share of {stream.share} of an epoch and {stream.steps} steps, expected "
                "one of them; leave the other out"
            )
        if not 0 < stream.retain_share <= 1:
            raise InputError(
                f"got a retain share of {stream.retain_share}, expected more than 0 and at most 1; "
                "give such a number",
                option="retain_share",
            )
        return stream


@dataclass(frozen=True)
class Reader:
    """How one rank reads an image set: its seed, its place among the ranks, workers and device."""

    seed: int  # order and augmentation follow from it
    rank: int = 0
    world: int = 1  # ranks in all
    workers: int = 0  # processes or threads that make batches; 0: the caller's own
    device: torch.device | str = "cpu"  # where the batches go
    block: int = 0  # neighbouring samples that an epoch reads together, see `order.epoch_parts`


class Batch(NamedTuple):
    """This rank's part of one global batch.

    Letters: B samples on this rank, C channels (3), H x W pixels.
    """

    images: Tensor  # (B, C, H, W) floating point, normalised by the model's preset, channels-last
    labels: Tensor  # (B,) int64, in [0, classes)
    forget: Tensor  # (B,) bool, true where the sample is to be forgotten
    index: Tensor  # type: ignore[assignment]  # (B,) int64, the sample's number in its set
    total: int  # samples of the global batch, the same on every rank
    rows: Tensor | None = None  # (B, ...) what `Phase.rows` has of each sample; no loader gives any

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies from pinned memory do not wait for the device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with each of its tensors changed alike, such as cut to some rows."""
        images, labels, forget, index = (change(tensor) for tensor in self[:4])
        rows = None if self.rows is None else change(self.rows)
        return Batch(images, labels, forget, index, self.total, rows)


class Loader(Protocol):
    """One image set, split into forget and retain, read by one rank."""

    def train(self, stream: Stream | Reads, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch: shuffled, augmented, on the host or the device.

        A bare name such as "retain" is its plain `Stream`. `skip` leaves out the first batches, as
        a resumed run needs; what follows is what would have come without the interruption.
        """
        ...

    def steps(self, stream: Stream | Reads) -> int:
        """Count the global batches of `train(stream, ...)`; equal on every rank."""
        ...

    def sweep(self, indices: Sequence[int] | None = None, skip: int = 0) -> Iterator[Batch]:
        """This rank's share of `indices` (default: all), test transform, in order, none twice.

        Over all ranks every index comes exactly once. A rank may receive nothing. `skip` leaves out
        the first batches of this rank.
        """
        ...
