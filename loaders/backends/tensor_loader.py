"""Loader of datasets with a transform of their own: their float tensors, without any change.

Order, streams and ranks are those of every backend. The dataset's own random transforms draw from
torch's generator, which is seeded by (seed, epoch, sample) around each item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from letheon.errors import InputError
from letheon.loaders import order
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Batch
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.datasets.map_style import KeyedRandom, MapStyleImages
from letheon.loaders.preset import Preset


@dataclass(frozen=True)
class _Collation(Dataset[Batch | InputError]):
    """Item k is part k as a whole batch, or why it cannot be read."""

    source: MapStyleImages
    numbers: NDArray[np.int64]  # (N,) the number in `source` of each image
    images: ImageSet
    forget: NDArray[np.bool_]
    parts: list[order.Part]
    seed: int
    epoch: int | None  # None: a sweep

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> Batch | InputError:
        index, turn, total = self.parts[k]
        try:
            rows = [self._row(i, t) for i, t in zip(index.tolist(), turn.tolist(), strict=True)]
        except InputError as error:
            return error
        shapes = {tuple(row.shape) for row in rows}
        if len(shapes) > 1:
            return InputError(
                f"{self.source.name}: got images of shapes {min(shapes)} and {max(shapes)} in one "
                "batch, expected one; resize them in the dataset's transform"
            )
        return Batch(
            torch.stack(rows).contiguous(memory_format=torch.channels_last),
            torch.from_numpy(self.images.labels[index]),
            torch.from_numpy(self.forget[index]),
            torch.from_numpy(index),
            total,
        )

    def _row(self, i: int, turn: int) -> Tensor:
        """(C, H, W) float32 of sample i."""
        purpose, epoch = "dataset", self.epoch
        if epoch is None:
            purpose, epoch = "dataset-sweep", 0
        number = int(self.numbers[i])
        with KeyedRandom(self.seed, purpose, order.turn_epoch(epoch, turn), i):
            image, _ = self.source.item(number)
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.dim() != 3:
            kind = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise InputError(
                f"{self.source.path(number)}: got {kind}, expected a floating-point (C, H, W) "
                "tensor as the dataset's first; make its transform give these for all images"
            )
        return image.to(torch.float32)


class TensorLoader(TorchLoader):
    """`Loader` over a `MapStyleImages` whose images are float tensors; batches on the host.

    Images are (B, C, H, W) float32, channels-last, exactly the dataset's own: no resize, no
    augmentation and no normalization of the preset. A sweep draws the dataset's random transforms
    too, in one way for each sample. `workers` processes make whole batches.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `Backend`.

        Raises:
            InputError: The images are not float tensors of a map-style dataset.
        """
        super().__init__(*args, **kwargs)
        if not isinstance(self.source, MapStyleImages) or not self.source.tensors:
            raise InputError(
                f"{self.images.name}: got images for the loader tensor that are not float tensors "
                "of a dataset, expected these; use the loader auto",
                option="loader",
            )

    def collation(
        self, parts: list[order.Part], epoch: int | None, preset: Preset
    ) -> Dataset[Batch | InputError]:
        """The dataset whose item k is the batch of `parts[k]`.

        Raises:
            InputError: Another size than the preset's is wanted.
        """
        if preset.size != self.preset.size:
            raise InputError(
                f"{self.images.name}: got an image size of {preset.size} for tensors that the "
                "dataset has transformed already, expected none; leave the size out"
            )
        assert isinstance(self.source, MapStyleImages)
        return _Collation(
            self.source, self.numbers, self.images, self.forget, parts, self.seed, epoch
        )
