"""The plain loader: Pillow or arrays, torchvision's resize, a DataLoader's worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from letheon.loaders import augment, order, transform
from letheon.loaders.batch import Batch, Reads
from letheon.loaders.errors import InputError
from letheon.loaders.images import ImageSet
from letheon.loaders.preset import Preset


@dataclass(frozen=True)
class _Assembly(Dataset[Batch | InputError]):
    """Item k is part k as a finished batch, made in whichever process asks."""

    images: ImageSet
    forget: NDArray[np.bool_]
    preset: Preset
    parts: list[order.Part]
    seed: int
    epoch: int | None  # None: test transform

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> Batch | InputError:
        index, turn, total = self.parts[k]
        try:
            raw = self.images.read_many(index)
        except InputError as error:  # handed over whole: a worker's raise would become many lines
            return error
        if self.epoch is None:
            pixels = transform.squares(raw, self.preset)
        else:
            u = augment.draws(self.seed, self.epoch, turn, index, self.preset)
            pixels = transform.augmented(raw, u, self.preset)
        return Batch(
            transform.normalised(pixels, self.preset),
            torch.from_numpy(self.images.labels[index]),
            torch.from_numpy(self.forget[index]),
            torch.from_numpy(index),
            total,
        )


def _unchanged(batch: Any) -> Any:
    return batch


class TorchLoader:
    """`Loader` over any `ImageSet`; images are float32, on the host, pinned where CUDA is there.

    `workers` processes make whole batches; they live for one epoch and end with it, also when it
    is left early (the generator closed or dropped). With 0 the batches are made in this process.
    """

    def __init__(
        self,
        images: ImageSet,
        forget: NDArray[np.bool_],
        preset: Preset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        """`forget` is (N,) bool; `batch_size` counts the samples of all ranks together.

        Raises:
            InputError: Fewer samples in the set or in a batch than ranks.
        """
        assert forget.shape == (len(images),) and forget.dtype == np.bool_ and 0 <= rank < world
        if min(batch_size, len(images)) < world or batch_size < 1:
            raise InputError(
                f"got {world} processes for a batch of {batch_size} out of {len(images)} images, "
                "expected at least one image each; start fewer processes or raise the batch size"
            )
        self.images, self.forget, self.preset = images, forget, preset
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.workers = workers

    def train(self, reads: Reads, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, as `Loader.train`; audited by index as they come.

        Raises:
            InputError: The stream is empty, a batch has fewer samples than ranks, or an image
                is unreadable.
        """
        parts = order.epoch_parts(
            reads, self.forget, self.batch_size, self.seed, epoch, self.rank, self.world
        )
        return self._audited(reads, parts[skip:], epoch)

    def steps(self, reads: Reads) -> int:
        """Global batches in one epoch of `train(reads, ...)`; equal on every rank."""
        return len(order.stream_sizes(reads, self.forget, self.batch_size, self.world))

    def sweep(self, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """This rank's contiguous share, in order, so rows gathered by rank are in order again.

        `Batch.total` is the number of samples of the whole sweep. Ranks may differ by one batch.
        """
        wanted = np.arange(len(self.images)) if indices is None else np.asarray(indices, np.int64)
        mine = wanted[order.share(len(wanted), self.rank, self.world)]
        step = -(-self.batch_size // self.world)
        cuts = [mine[start : start + step] for start in range(0, len(mine), step)]
        return self._batches([order.Part(i, np.zeros_like(i), len(wanted)) for i in cuts], None)

    def _audited(self, reads: Reads, parts: list[order.Part], epoch: int) -> Iterator[Batch]:
        for batch in self._batches(parts, epoch):
            order.audit(reads, self.forget[batch.index.numpy()])
            yield batch

    def _batches(self, parts: list[order.Part], epoch: int | None) -> Iterator[Batch]:
        assembly = _Assembly(self.images, self.forget, self.preset, parts, self.seed, epoch)
        pin = torch.cuda.is_available()
        source: Iterator[Batch | InputError]
        if self.workers:
            # Its own generator: the default one would be advanced, by as much as workers demand.
            source = iter(
                DataLoader(
                    assembly,
                    batch_size=None,
                    num_workers=min(self.workers, max(1, len(parts))),
                    collate_fn=_unchanged,
                    pin_memory=pin,
                    generator=torch.Generator(),
                )
            )
        else:
            source = (assembly[k] for k in range(len(parts)))
        for batch in source:
            if isinstance(batch, InputError):
                raise batch
            yield _pinned(batch) if pin and not self.workers else batch


def _pinned(batch: Batch) -> Batch:
    images, labels, forget, index = (tensor.pin_memory() for tensor in batch[:4])
    return Batch(images, labels, forget, index, batch.total)
