"""The plain loader: Pillow or arrays, torchvision's resize, a DataLoader's worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from letheon.errors import InputError
from letheon.loaders import order
from letheon.loaders.backends.base import Backend
from letheon.loaders.batch import Batch
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment, geometry
from letheon.loaders.transforms.normalize import normalize
from letheon.processes import follow_parent, in_main_thread


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
            pixels = geometry.squares(raw, self.preset)
        else:
            u = augment.draws(self.seed, self.epoch, turn, index, self.preset)
            pixels = geometry.augment_images(raw, u, self.preset)
        return Batch(
            normalize(pixels, self.preset),
            torch.from_numpy(self.images.labels[index]),
            torch.from_numpy(self.forget[index]),
            torch.from_numpy(index),
            total,
        )


def _identity(batch: Any) -> Any:
    return batch


def _start_worker(by_signal: bool, worker: int) -> None:
    follow_parent(by_signal)


class TorchLoader(Backend):
    """`Loader` over any `ImageSet`; images are float32, on the host, pinned where CUDA is there.

    `workers` processes make whole batches; they live for one epoch and end with it, also when it
    is left early (the generator closed or dropped). With 0 the batches are made in this process.
    """

    def make_batches(
        self, parts: list[order.Part], epoch: int | None, preset: Preset
    ) -> Iterator[Batch]:
        """Yield the batches of `parts`; see `Backend`."""
        dataset = self.collation(parts, epoch, preset)
        pin = torch.cuda.is_available()
        source: Iterator[Batch | InputError]
        if self.workers:
            geometry.import_resize()
            # Its own generator: the default one would be advanced, by as much as workers demand.
            source = iter(
                DataLoader(
                    dataset,
                    batch_size=None,
                    num_workers=min(self.workers, max(1, len(parts))),
                    collate_fn=_identity,
                    pin_memory=pin,
                    generator=torch.Generator(),
                    worker_init_fn=partial(_start_worker, in_main_thread()),
                )
            )
        else:
            source = (dataset[k] for k in range(len(parts)))
        for batch in source:
            if isinstance(batch, InputError):
                raise batch
            yield _pin(batch) if pin and not self.workers else batch

    def collation(
        self, parts: list[order.Part], epoch: int | None, preset: Preset
    ) -> Dataset[Batch | InputError]:
        """The dataset whose item k is the batch of `parts[k]`, or why it cannot be read."""
        return _Assembly(self.images, self.forget, preset, parts, self.seed, epoch)


def _pin(batch: Batch) -> Batch:
    images, labels, forget, index = (tensor.pin_memory() for tensor in batch[:4])
    return Batch(images, labels, forget, index, batch.total)
