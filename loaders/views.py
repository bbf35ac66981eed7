"""The readable images of a set, where the user wants the others left out instead of an error.

Every image is decoded once before the run, so the set has its final size from the start: batches
are full, `Batch.total` is right, and nothing depends on the number of ranks, who each do the same.
An image that breaks later is an error that names it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from letheon.errors import InputError
from letheon.loaders.datasets.image_set import ArrayImages, ImageSet
from letheon.loaders.encoded import stored

CHUNK = 64  # images of one task


class Readable(ImageSet):
    """Some images of a set under new numbers 0..n-1, in the old order; the classes stay."""

    def __init__(self, images: ImageSet, left_out: dict[int, str]) -> None:
        """`left_out` tells by the old number why an image is not in."""
        self.images = images
        self.numbers = np.setdiff1d(np.arange(len(images)), list(left_out))  # (n,) the old ones
        self.name, self.classes = images.name, images.classes
        self.labels = images.labels[self.numbers]
        self.left_out = (*images.left_out, *(left_out[i] for i in sorted(left_out)))

    @property
    def digest(self) -> str:
        """Over the images' own and the numbers that are left."""
        total = hashlib.sha256(self.images.digest.encode())
        total.update(self.numbers.astype("<i8").tobytes())
        return total.hexdigest()

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i."""
        return self.images.read(int(self.numbers[i]))

    def read_many(
        self, indices: NDArray[np.int64]
    ) -> Sequence[NDArray[np.uint8]] | NDArray[np.uint8]:
        """The images of `indices`, as the original set gives them."""
        return self.images.read_many(self.numbers[indices])

    def path(self, i: int) -> str:
        """What image i is called in messages: its old name."""
        return self.images.path(int(self.numbers[i]))


def readable(images: ImageSet, progress: bool = True) -> ImageSet:
    """`images` without those that cannot be read; itself where all can.

    Takes this process's share of the machine's cores. Arrays in memory are taken as they are.

    Raises:
        InputError: None can be read.
    """
    if isinstance(images, ArrayImages):
        return images
    threads = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    starts = range(0, len(images), CHUNK)
    found: dict[int, str] = {}
    with ThreadPoolExecutor(max(1, threads), "readable") as pool:
        chunks = pool.map(lambda start: _unreadable(images, start), starts)
        quiet = None if progress and os.environ.get("RANK", "0") == "0" else True
        for chunk in tqdm(
            chunks, f"reading {images.name} once", len(starts), disable=quiet, leave=False
        ):
            found |= chunk
    if not found:
        return images
    if len(found) == len(images):
        raise InputError(f"none of the {len(images)} images can be read; first: {found[0]}")
    return Readable(images, found)


def _unreadable(images: ImageSet, start: int) -> dict[int, str]:
    """Those of `CHUNK` images from `start` that cannot be read, and why."""
    found = {}
    for i in range(start, min(start + CHUNK, len(images))):
        try:
            (one,) = stored(images, np.array([i]))
            if isinstance(one, InputError):
                raise one
            one.pixels()
        except InputError as error:
            found[i] = str(error)
    return found


def told_left_out(sets: Mapping[str, ImageSet]) -> list[str]:
    """A line for the user about each set of which something was left out."""
    return [
        f"left out {len(images.left_out)} unreadable of {len(images.left_out) + len(images)} "
        f"images of {name}: {'; '.join(images.left_out)}"
        for name, images in sets.items()
        if images.left_out
    ]
