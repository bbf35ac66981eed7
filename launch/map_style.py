"""Map-style datasets as image sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.loaders import order
from letheon.loaders.backends.base import Backend
from letheon.loaders.batch import Batch
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.preset import Preset


class MapStyleImages(ImageSet):
    """A dataset of (image, label) pairs: PIL images, or tensors that are used as they are."""

    def __init__(self, dataset: Any, name: str, classes: tuple[str, ...] | None = None) -> None:
        self.dataset, self.name = dataset, name
        self.labels = np.array([int(dataset[i][1]) for i in range(len(dataset))], np.int64)
        names = classes or getattr(dataset, "classes", None)
        self.classes = tuple(names or (str(c) for c in range(int(self.labels.max()) + 1)))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the first tensor; None of PIL images."""
        first = self.dataset[0][0]
        return tuple(first.shape) if isinstance(first, torch.Tensor) else None

    @property
    def digest(self) -> str:
        """Over the labels."""
        return hashlib.sha256(self.labels.tobytes()).hexdigest()

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i."""
        image = self.dataset[i][0]
        if isinstance(image, torch.Tensor):
            raise InputError(f"got tensors of {self.name}")
        return np.asarray(image.convert("RGB"))


class TensorLoader(Backend):
    """`Loader` over a dataset that gives tensors, which are used as they are, in this process."""

    def make_batches(
        self, parts: list[order.Part], epoch: int | None, preset: Preset
    ) -> Iterator[Batch]:
        """Yield the batches of `parts`; see `Backend`."""
        assert isinstance(self.source, MapStyleImages)
        for part in parts:
            rows = [self.source.dataset[int(i)][0] for i in self.numbers[part.samples]]
            images = torch.stack(rows).float().contiguous(memory_format=torch.channels_last)
            yield self._finish(images, part).to(self.device)
