"""What the loader backends have in common: they are told parts of batches, and make the batches."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import InputError
from letheon.loaders import order
from letheon.loaders.backends.memory import to_device
from letheon.loaders.batch import Batch, Reader, Reads, Stream
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.preset import Preset
from letheon.loaders.views import unwrap
from letheon.spans import waits

T = TypeVar("T")
AHEAD = 2  # batches under way beyond the one that is waited for


class Backend(ABC):
    """A `Loader` whose batches are made by `_batches` of a subclass."""

    shares_pass = True  # whether several runs may be fed from one pass, see `shared_pass`

    def __init__(
        self,
        images: ImageSet,
        forget: NDArray[np.bool_],
        preset: Preset,
        batch_size: int,
        reader: Reader,
    ) -> None:
        """`forget` is (N,) bool; `batch_size` counts the samples of all ranks together.

        Raises:
            InputError: Fewer samples in a batch than ranks.
        """
        assert forget.shape == (len(images),) and forget.dtype == np.bool_
        assert 0 <= reader.rank < reader.world
        check_batch(batch_size, reader.world)
        self.images, self.forget, self.preset = images, forget, preset
        # Where the pixels come from, and the number in it of each image; labels are `images`'.
        self.source, self.numbers = unwrap(images)
        self.batch_size, self.seed, self.block = batch_size, reader.seed, reader.block
        self.rank, self.world = reader.rank, reader.world
        self.workers, self.device = reader.workers, torch.device(reader.device)

    def resplit(self, forget: NDArray[np.bool_], batch_size: int, seed: int) -> Self:
        """A second loader over the same images, which are kept once; not for use in two threads.

        Raises:
            InputError: Fewer samples in a batch than ranks.
        """
        assert forget.shape == self.forget.shape
        check_batch(batch_size, self.world)
        other = copy.copy(self)
        other.forget, other.batch_size, other.seed = forget, batch_size, seed
        return other

    def train(self, stream: Stream | Reads, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, as `Loader.train`; audited by index.

        Raises:
            InputError: The stream is empty, or an image is unreadable.
        """
        stream = Stream.of(stream)
        parts = self.parts(stream, epoch)
        preset = self.preset.with_size(stream.image_size)
        return waits("data", self.deliver(parts[skip:], epoch, preset))

    def deliver(self, parts: list[order.Part], epoch: int, preset: Preset) -> Iterator[Batch]:
        """Yield `make_batches`, with an empty batch for each part that has no sample."""
        if not self.shares_pass or all(len(part.samples) for part in parts):
            return self.make_batches(parts, epoch, preset)
        return self._with_empty(parts, epoch, preset)

    def _with_empty(self, parts: list[order.Part], epoch: int, preset: Preset) -> Iterator[Batch]:
        full = self.make_batches([part for part in parts if len(part.samples)], epoch, preset)
        try:
            for part in parts:
                yield next(full) if len(part.samples) else self.empty_batch(part, preset)
        finally:
            if isinstance(full, Generator):
                full.close()

    def empty_batch(self, part: order.Part, preset: Preset) -> Batch:
        """Make this rank's part of a global batch that has fewer samples than there are ranks."""
        shape = (0, 3, preset.size, preset.size)
        return self._finish(torch.empty(shape, device=self.device), part)

    def parts(self, stream: Stream | Reads, epoch: int) -> list[order.Part]:
        """This rank's parts of the global batches of `train(stream, epoch)`, audited by index."""
        stream = Stream.of(stream)
        parts = order.epoch_parts(
            stream, self.forget, self.batch_size, self.seed, epoch, self.rank, self.world,
            self.block,
        )  # fmt: skip
        for part in parts:
            order.audit(stream.reads, self.forget[part.samples])
        return parts

    def steps(self, stream: Stream | Reads) -> int:
        """Count the global batches of `train(stream, ...)`; equal on every rank."""
        return len(order.stream_sizes(stream, self.forget, self.batch_size))

    def sweep(self, indices: Sequence[int] | None = None, skip: int = 0) -> Iterator[Batch]:
        """This rank's contiguous share, in order, so rows gathered by rank are in order again.

        `Batch.total` is the number of samples of the whole sweep. Ranks may differ by one batch.
        """
        return self.read_parts(self.sweep_parts(indices)[skip:])

    def sweep_parts(self, indices: Sequence[int] | None = None) -> list[order.Part]:
        """Cut this rank's share of a sweep into batches."""
        wanted = np.arange(len(self.images)) if indices is None else np.asarray(indices, np.int64)
        mine = wanted[order.share(len(wanted), self.rank, self.world)]
        step = -(-self.batch_size // self.world)
        cuts = [mine[start : start + step] for start in range(0, len(mine), step)]
        return [order.Part(i, np.zeros_like(i), len(wanted)) for i in cuts]

    def read_parts(self, parts: list[order.Part]) -> Iterator[Batch]:
        """Yield the batches of some parts of a sweep, with the test transform."""
        return waits("data", self.make_batches(parts, None, self.preset))

    @abstractmethod
    def make_batches(
        self, parts: list[order.Part], epoch: int | None, preset: Preset
    ) -> Iterator[Batch]:
        """Yield the batches of any `parts` of an epoch, in order; None is the test transform."""

    def _finish(self, images: Tensor, part: order.Part) -> Batch:
        """`images` with what is known about them, on the device."""
        samples = part.samples
        labels, forget, index = (
            to_device(torch.from_numpy(values), self.device)
            for values in (self.images.labels[samples], self.forget[samples], samples)
        )
        return Batch(images, labels, forget, index, part.total)


def check_batch(batch_size: int, world: int) -> None:
    """Refuse a batch size that leaves a rank with nothing in every batch."""
    if batch_size < world or batch_size < 1:
        raise InputError(
            f"got {world} processes for a batch of {batch_size} images, expected at least one "
            "image each; start fewer processes or raise the batch size"
        )


def prefetch(make: Callable[[order.Part], T], parts: list[order.Part]) -> Iterator[T]:
    """`make(part)` of each part, made in one thread that is `AHEAD` parts in front.

    The thread ends with the iterator, also when that is closed or dropped early.
    """
    pool = ThreadPoolExecutor(1, "loader")
    try:
        waiting = deque(pool.submit(make, part) for part in parts[:AHEAD])
        for k in range(len(parts)):
            made = waiting.popleft().result()
            if k + AHEAD < len(parts):
                waiting.append(pool.submit(make, parts[k + AHEAD]))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
