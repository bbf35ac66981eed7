"""The baseline's input: ImageFolder, Pillow, ToTensor and a DataLoader's worker processes.

Which samples come in which batch, and where each is cropped and mirrored, is told from outside by
our own keyed draws, so that both sides train on the same pictures. (The published code draws them
in its workers; that cost is left out, in its favour.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from letheon.loaders import order
from letheon.loaders.batch import Reads
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment

Key = tuple[int, NDArray[np.float64]]  # a sample's number and its draws
Loaded = DataLoader[Any]  # of (images, labels)


def test_transform(preset: Preset) -> transforms.Compose:
    """Resize the shorter side, cut the centre, scale to 0..1; the network normalizes."""
    assert preset.resize == "short"
    steps = [transforms.Resize(preset.resize_to), transforms.CenterCrop(preset.size)]
    return transforms.Compose([*steps, transforms.ToTensor()])


class Augmented(Dataset[tuple[Tensor, int]]):
    """The training images; an item is asked for by its number and its draws."""

    def __init__(self, folder: ImageFolder, labels: NDArray[np.int64], preset: Preset) -> None:
        self.folder, self.labels, self.preset = folder, labels, preset
        self.scaled = transforms.ToTensor()
        square = [transforms.Resize(preset.resize_to), transforms.CenterCrop(preset.size)]
        self.square = transforms.Compose(square)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        number, draws = key
        preset, size = self.preset, self.preset.size
        image: Image.Image = self.folder.loader(self.folder.samples[number][0])
        if preset.augment == "resized-crop-flip":
            shape = np.array([[image.height, image.width]])
            top, left, height, width = augment.boxes(draws[None], shape)[0].tolist()
            image = image.crop((left, top, left + width, top + height))
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        else:
            image = ImageOps.expand(self.square(image), size // 8)
            top, left = augment.offsets(draws[None], preset)[0].tolist()
            image = image.crop((left, top, left + size, top + size))
        if augment.mirror_mask(draws[None], preset)[0]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.scaled(image), int(self.labels[number])


class Images:
    """Train and held-out images of one folder, cut into forget and retain by class."""

    def __init__(self, root: Path, forget: Sequence[int], preset: Preset, workers: int) -> None:
        self.preset, self.workers = preset, workers
        self.pin = torch.cuda.is_available()
        self.train = ImageFolder(str(root / "train"), test_transform(preset))
        self.val = ImageFolder(str(root / "val"), test_transform(preset))
        self.labels = np.array(self.train.targets, dtype=np.int64)
        self.forget = np.isin(self.labels, forget)
        self.classes = list(forget)

    def batches(
        self, reads: Reads, batch_size: int, seed: int, epoch: int, labels: NDArray[np.int64]
    ) -> Loaded:
        """One epoch of augmented batches, in our order; `labels` (N,) are what is to be learnt."""
        parts = order.epoch_parts(reads, self.forget, batch_size, seed, epoch)
        keys: list[list[Key]] = []
        for samples, turn, _ in parts:
            draws = augment.draws(seed, epoch, turn, samples, self.preset)
            keys.append(list(zip(samples.tolist(), draws, strict=True)))
        data = Augmented(self.train, labels, self.preset)
        return DataLoader(
            data, batch_sampler=keys, num_workers=self.workers, pin_memory=self.pin
        )  # fmt: skip

    def parts(self) -> dict[str, Subset[tuple[Tensor, int]]]:
        """The four sets that accuracy is measured on."""
        held_out = np.isin(np.array(self.val.targets), self.classes)
        cut = {
            "FA": (self.train, self.forget),
            "RA": (self.train, ~self.forget),
            "TFA": (self.val, held_out),
            "TRA": (self.val, ~held_out),
        }
        return {k: Subset(data, np.flatnonzero(m).tolist()) for k, (data, m) in cut.items()}

    def in_order(self, data: Dataset[tuple[Tensor, int]], batch_size: int) -> Loaded:
        """The images of a set in order, under the test transform."""
        return DataLoader(data, batch_size, num_workers=self.workers, pin_memory=self.pin)
