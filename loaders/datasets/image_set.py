"""An image set: numbered RGB images with labels, wherever they are kept; and train with test."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError, UnreadableImage
from letheon.loaders.decode.encoded_image import EncodedImage, from_pixels

MAX_CLASSES = 2**20  # of labels that are numbers alone: each below the largest gets a name


class ImageSet(ABC):
    """N images, numbered 0..N-1 in an order that is the same on every file system.

    Must survive pickling, since loader workers may be spawned.
    """

    name: str  # for messages and tables
    labels: NDArray[np.int64]  # (N,), in [0, len(classes))
    classes: tuple[str, ...]  # unique names, in label order
    left_out: tuple[str, ...] = ()  # what was unreadable and dropped on request: name and reason
    notes: tuple[str, ...] = ()  # what a user should know about how the set was read

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 in hex over what the set holds; equal for equal sets on every machine."""

    @property
    def true_labels(self) -> NDArray[np.int64]:
        """(N,) labels before canaries were planted; `labels` where there are none."""
        return self.labels

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i, (H, W, 3) RGB uint8; raises `UnreadableImage` naming the file."""

    def read_many(
        self, indices: NDArray[np.int64]
    ) -> Sequence[NDArray[np.uint8]] | NDArray[np.uint8]:
        """The images of `indices`: a list of (H, W, 3), or one (B, H, W, 3) where sizes are one."""
        return [self.read(int(i)) for i in indices]

    def read_encoded(self, indices: NDArray[np.int64]) -> Sequence[EncodedImage | UnreadableImage]:
        """Each image of `indices` as it is kept, a JPEG not decoded yet, or why it is unreadable.

        Raises:
            InputError: A file that is broken as a whole.
        """
        return [self._try_encoded(i) for i in indices.tolist()]

    def _try_encoded(self, i: int) -> EncodedImage | UnreadableImage:
        try:
            return self.encoded_image(i)
        except UnreadableImage as error:
            return error

    def encoded_image(self, i: int) -> EncodedImage:
        """Image i as it is kept; raises `UnreadableImage`."""
        return from_pixels(self.read(i), self.path(i))

    def path(self, i: int) -> str:
        """What image i is called in messages."""
        return f"{self.name}[{i}]"


def number_classes(largest: int, where: object) -> tuple[str, ...]:
    """Name classes "0", "1", ... that have no names of their own, for labels up to `largest`.

    Raises:
        InputError: They are more than `MAX_CLASSES`; `where` says of what set.
    """
    if largest >= MAX_CLASSES:
        raise InputError(
            f"{where}: got a label of {MAX_CLASSES} or more, expected numbers from 0 up to the "
            "count of the classes; number them anew"
        )
    return tuple(map(str, range(largest + 1)))


@dataclass(frozen=True)
class Data:
    """The images a classifier is trained on, and those held out; both of the same classes."""

    train: ImageSet
    test: ImageSet
    names: tuple[tuple[str, ...], ...]  # for each class all it is called; its name in the set first
    notes: tuple[str, ...] = ()  # what a user should know about how the data was read

    @property
    def classes(self) -> tuple[str, ...]:
        """Unique names in label order."""
        return self.train.classes


class ArrayImages(ImageSet):
    """Images of one size held in memory, or mapped from a file."""

    def __init__(
        self,
        name: str,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        classes: Sequence[str],
        digest: str = "",
    ) -> None:
        """`pixels` is (N, H, W, 3) uint8 RGB; an empty `digest` is computed when first asked."""
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise InputError(
                f"{name}: got {pixels.dtype} images of shape {pixels.shape}, "
                "expected uint8 (N, H, W, 3); convert them to RGB bytes"
            )
        if labels.shape != (len(pixels),):
            raise InputError(
                f"{name}: got {labels.shape} labels for {len(pixels)} images, expected one each"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
            raise InputError(
                f"{name}: got labels {labels.min()}..{labels.max()} for {len(classes)} classes, "
                f"expected 0..{len(classes) - 1}; mend the labels or name every class"
            )
        self.name = name
        self.pixels = pixels
        self.labels = labels.astype(np.int64, copy=False)
        self.classes = tuple(classes)
        self._digest = digest

    @property
    def digest(self) -> str:
        """Over the shape, the class names, the labels and every pixel."""
        if not self._digest:
            head = f"{self.pixels.shape}\n" + "\n".join(self.classes)
            total = hashlib.sha256(head.encode())
            total.update(self.labels.astype("<i8").tobytes())
            for start in range(0, len(self), 4096):
                total.update(self.pixels[start : start + 4096].tobytes())
            self._digest = total.hexdigest()
        return self._digest

    def read(self, i: int) -> NDArray[np.uint8]:
        """A view of image i."""
        return self.pixels[i]

    def read_many(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(B, H, W, 3), a copy, gathered at once."""
        return self.pixels[indices]
