"""An image set in a model's class numbering: ten ImageNet classes before a 1000-way network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.loaders.datasets import imagenet
from letheon.loaders.datasets.image_set import Data, ImageSet


class Relabelled(ImageSet):
    """The same images under other label numbers; class k of the result may have no image here."""

    def __init__(self, images: ImageSet, classes: tuple[str, ...]) -> None:
        """`classes` holds every class of `images` by name."""
        place = {name: number for number, name in enumerate(classes)}
        table = np.array([place[name] for name in images.classes], dtype=np.int64)
        self.images = images
        self.name, self.left_out = images.name, images.left_out
        self.classes = classes
        self.labels = table[images.labels]

    @property
    def digest(self) -> str:
        """The images' own: the numbering follows from the model, which has its own digest."""
        return self.images.digest

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i of the original set."""
        return self.images.read(i)

    def read_many(
        self, indices: NDArray[np.int64]
    ) -> Sequence[NDArray[np.uint8]] | NDArray[np.uint8]:
        """The images of `indices`, as the original set gives them."""
        return self.images.read_many(indices)

    def path(self, i: int) -> str:
        """What image i is called in messages."""
        return self.images.path(i)


def model_classes(
    named: tuple[str, ...] | None, count: int, data: tuple[str, ...]
) -> tuple[str, ...]:
    """The names of a model's `count` classes, before a data set with classes `data`.

    A model that names its classes is believed. One that does not has the data's classes where the
    counts agree, and ImageNet's where it has a thousand and the data are folders of WordNet ids.

    Raises:
        InputError: neither fits.
    """
    if named is not None:
        return named
    if count == len(data):
        return data
    wnids = tuple(imagenet.words())
    if count == len(wnids) and set(data) <= set(wnids):
        return wnids
    raise InputError(
        f"got a model of {count} classes for data of {len(data)} ({', '.join(data[:3])}, ...); "
        "expected equal counts, or an ImageNet model and WordNet ids; use the model's own data"
    )


def aligned(data: Data, classes: tuple[str, ...]) -> Data:
    """`data` with labels in the numbering of `classes`; itself where that is its own.

    Raises:
        InputError: the data has a class that the model does not know.
    """
    if data.classes == classes:
        return data
    unknown = sorted(set(data.classes) - set(classes))
    if unknown:
        raise InputError(
            f"got data of class {unknown[0]!r} ({len(unknown)} such classes), which the model does "
            f"not know; it knows {len(classes)} ({', '.join(classes[:3])}, ...); use its own data"
        )
    words = imagenet.words()
    known = dict(zip(data.classes, data.names, strict=True))
    names = tuple(known.get(c, (c, words[c]) if c in words else (c,)) for c in classes)
    return Data(Relabelled(data.train, classes), Relabelled(data.test, classes), names)
