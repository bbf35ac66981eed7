"""What a user says about the images: the set, its loader, and what becomes of unreadable ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.errors import name_option
from letheon.loaders.backends.resident_loader import ResidentLoader
from letheon.loaders.batch import Loader, Reader
from letheon.loaders.datasets.image_set import ArrayImages, Data, ImageSet
from letheon.loaders.factory import CacheOptions, Kind, make_loader
from letheon.loaders.open import open_data, open_domains
from letheon.loaders.preset import Preset
from letheon.loaders.views import drop_unreadable, order_classes, unwrap


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of every script that shows images to a network."""

    data: str = "digits"
    """Upstream set: `digits`, or a folder or archive with train/<class>/ and val/<class>/."""
    classes: str = ""
    """File with the names of the class folders in the model's order, one a line; without, folders
    that are numbers come in their order, and others sorted."""
    holdout: float = 0
    """Share of each class held out as test images, where the set has none, such as 0.1 of one
    folder of classes; which they are follows from their names and `holdout_seed`."""
    holdout_seed: int = 0
    """Which images are held out; all runs on a set, whatever their seed, should have the same."""
    seed: int = 1
    """Order, augmentation, drawn labels and new weights follow from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is some, else the CPU."""
    loader: Kind = "auto"
    """Backend that reads the images; auto takes what suits the set and says so."""
    workers: int = 2
    """Loader processes or threads per rank for sets read from files; sets in memory need none."""
    caches: CacheOptions = field(default_factory=CacheOptions)
    block: int = 0
    """For sets larger than memory: so many neighbouring images are one block, and an epoch shuffles
    the images of 64 blocks at a time, in place of all; 0: a full shuffle."""
    unreadable: Literal["error", "drop"] = "error"
    """error: an image that cannot be read ends the job, which names it; drop: all are read once
    before the start, and what cannot be read is left out, counted and named."""

    def open_loader(
        self,
        images: ImageSet,
        forget: NDArray[np.bool_],
        preset: Preset,
        batch_size: int,
        place: tuple[int, int, torch.device],
        tell: Callable[[str], object] = lambda text: None,
        like: Loader | None = None,
    ) -> Loader:
        """One image set as this rank reads it; `tell` hears why `auto` chose as it did.

        `place` is (rank, world, device). `like` is another loader of the set, whose images in
        memory are used as they are.
        """
        if isinstance(like, ResidentLoader):
            return like.resplit(forget, batch_size, self.seed)
        workers = 0 if isinstance(unwrap(images)[0], ArrayImages) else self.workers
        rank, world, device = place
        reader = Reader(self.seed, rank, world, workers, device, self.block)
        return make_loader(
            self.loader, images, forget, preset, batch_size, reader, self.caches,
            tell if rank == 0 else lambda _: None,
        )  # fmt: skip

    def open_data(self) -> Data:
        """The upstream set, without what is unreadable where that is to be dropped."""
        with name_option("data"):
            data = open_data(self.data, self.holdout, self.holdout_seed)
        if self.classes:
            with name_option("classes"):
                data = order_classes(data, self.classes)
        if self.unreadable == "error":
            return data
        train = drop_unreadable(data.train)
        test = train if data.test is data.train else drop_unreadable(data.test)
        return dataclasses.replace(data, train=train, test=test)

    def open_domains(self, path: str) -> dict[str, ImageSet]:
        """The domains at `path`, without what is unreadable where that is to be dropped."""
        with name_option("downstream"):
            domains = open_domains(path)
        if self.unreadable == "error":
            return domains
        return {name: drop_unreadable(images) for name, images in domains.items()}


OF_IMAGES = tuple(one.name for one in dataclasses.fields(DataOptions) if one.name != "seed")
"""Names of the options that say the same to every command on a set of images."""
