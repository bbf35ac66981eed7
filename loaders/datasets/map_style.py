"""Image set over any map-style torch dataset: `len` and `[i] -> (image, label)`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from letheon.errors import InputError, UnreadableImage
from letheon.kernels import keyed
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.datasets.label_files import COLUMNS
from letheon.loaders.decode.pillow import to_rgb

IMAGES = ("image", "img", "pixel_values")
"""Columns of a Hugging Face dataset that hold images: the first that there is."""
SMALL = 4096  # images; the digest of a larger set is over this many, drawn by number


class MapStyle(Protocol):
    """What `torch.utils.data.Dataset` is used for here."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class MapStyleImages(ImageSet):
    """The images and labels of a map-style dataset, such as torchvision's; pickles with it.

    PIL images and uint8 arrays or tensors, (H, W), (H, W, C) or (C, H, W) with C of 1 or 3, are
    read as (H, W, 3) RGB. A dataset that gives floating-point (C, H, W) tensors has a transform of
    its own: `tensors` is true, and `TensorLoader` delivers them as they are.

    Attributes:
        dataset: the dataset itself.
        tensors: whether its images are tensors of a floating dtype.
        listed: (N,) the label that each item must have when it is read; None while they are listed.
    """

    def __init__(self, dataset: MapStyle, name: str = "") -> None:
        """Labels are `dataset.targets` or `.labels` where these fit, else every item is read.

        Classes are `dataset.classes` (of a Hugging Face dataset, the names of its label) where
        these are as many as the labels need, else "0", "1", ...

        Raises:
            InputError: The set is empty, an item is no (image, label), or a label is no number
                from 0 on.
        """
        self.dataset, self.name = dataset, name or type(dataset).__name__
        self.listed: NDArray[np.int64] | None = None
        if not len(dataset):
            raise InputError(f"{self.name}: got an empty dataset, expected images; fill it")
        with KeyedRandom(0, "dataset", 0, 0):  # a random transform must not advance the process's
            image, first = self.item(0)
            labels = _label_array(dataset)
            if labels is None or len(labels) != len(dataset) or labels[0] != first:
                labels = np.array([self.item(i)[1] for i in range(len(dataset))], np.int64)
        self.tensors = isinstance(image, Tensor) and image.is_floating_point()
        if labels.min() < 0:
            raise InputError(
                f"{self.name}: got the label {labels.min()}, expected 0 and up; number the classes "
                "from 0"
            )
        self.labels = self.listed = labels
        inner = dataset.dataset if isinstance(dataset, Subset) else dataset
        feature = _features(inner).get(_find_key(_features(inner), COLUMNS))
        names = tuple(map(str, getattr(inner, "classes", getattr(feature, "names", ()))))
        fits = len(names) == len(set(names)) > labels.max()
        self.classes = names if fits else tuple(map(str, range(int(labels.max()) + 1)))

    def item(self, i: int) -> tuple[Any, int]:
        """Image and label number i as the dataset gives them.

        Raises:
            UnreadableImage: The dataset raised, or gave something else than an image and an
                integer label; the message names the image and the reason.
            InputError: The label is not the one that the dataset lists.
        """
        try:
            item = self.dataset[i]
        except Exception as error:  # whatever a dataset of the user's raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImage(
                f"{self.path(i)}: got an unreadable image ({reason}), expected an image and its "
                "label; mend the dataset"
            ) from error
        try:
            image, label = _split_item(item)
        except _Unfit as error:
            raise UnreadableImage(f"{self.path(i)}: {error}") from None
        if self.listed is not None and label != self.listed[i]:
            raise InputError(
                f"{self.path(i)}: got the label {label} with the image, where the dataset lists "
                f"{self.listed[i]}; expected one label; mend its targets or labels"
            )
        return image, label

    @property
    def digest(self) -> str:
        """Over class names, labels and pixels: all of a small set, a keyed sample of a large one.

        Of a dataset with random transforms, the pixels are those of one fixed draw.
        """
        n = len(self)
        total = hashlib.sha256("\n".join((str(n), *self.classes)).encode())
        total.update(self.labels.astype("<i8").tobytes())
        sample = torch.arange(n) if n <= SMALL else keyed.permutation(0, "digest", 0, n)[:SMALL]
        for i in sample.tolist():
            with KeyedRandom(0, "digest", 0, i):
                image = self.item(i)[0] if self.tensors else self.read(i)
            pixels = np.ascontiguousarray(image)
            total.update(f"{pixels.dtype} {pixels.shape}\n".encode())
            total.update(pixels.tobytes())
        return total.hexdigest()

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i, (H, W, 3) RGB uint8.

        Raises:
            UnreadableImage: As `item`, or it has another shape or dtype.
        """
        return _to_rgb(self.item(i)[0], self.path(i))


class _Unfit(Exception):
    """An item is no image with an integer label; the text says what it is, and what to do."""


def _find_key(of: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of these keys that a mapping has; empty where it has none."""
    return next((key for key in keys if key in of), "")


def _split_item(item: Any) -> tuple[Any, int]:
    """Split an item into image and label: a pair, or a mapping as Hugging Face's datasets give."""
    if isinstance(item, Mapping):
        image, label = _find_key(item, IMAGES), _find_key(item, COLUMNS)
        if not image or not label:
            raise _Unfit(
                f"got a {type(item).__name__} of {', '.join(map(str, item))}, expected one with "
                "image and label, or a pair of these; wrap the dataset so that it gives pairs"
            )
        return item[image], _whole_label(item[label])
    if not isinstance(item, tuple | list) or len(item) < 2:
        kind = type(item).__name__
        kind += f" of shape {tuple(item.shape)}" if isinstance(item, np.ndarray | Tensor) else ""
        raise _Unfit(
            f"got {kind}, expected (image, integer label); wrap the dataset so that it gives "
            "these, such as TensorDataset(images, labels)"
        )
    return item[0], _whole_label(item[1])


def _whole_label(label: Any) -> int:
    """The number of a class; a name, several numbers or a fraction is none."""
    if isinstance(label, np.ndarray | Tensor):
        if math.prod(label.shape) != 1:
            raise _Unfit(
                f"got a label of shape {tuple(label.shape)}, expected an integer label; of a "
                "one-hot one give label.argmax()"
            )
        label = label.item()
    try:
        whole = int(label)
        if isinstance(label, str | bytes) or whole != label:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise _Unfit(
            f"got the label {label!r}, expected an integer label; number the classes from 0, such "
            "as by names.index(label)"
        ) from None
    return whole


def _features(dataset: Any) -> Mapping[str, Any]:
    """What a Hugging Face dataset says of its columns; empty for all others."""
    found = getattr(dataset, "features", None)
    return found if isinstance(found, Mapping) else {}


class KeyedRandom:
    """Context in which torch's CPU generator is a function of (seed, purpose, epoch, index).

    The generator's state outside is put back at the end. Not for use in a thread: the generator is
    the process's.
    """

    def __init__(self, seed: int, purpose: str, epoch: int, index: int) -> None:
        """As the arguments of `keyed.hash_keys`."""
        drawn = keyed.hash_keys(seed, purpose, epoch, torch.tensor([index]), 1)
        self._number = int(drawn.item())

    def __enter__(self) -> None:
        self._state = torch.get_rng_state()
        torch.default_generator.manual_seed(self._number)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._state)


def _label_array(dataset: Any) -> NDArray[np.int64] | None:
    """(N,) labels that a dataset lists; None where it lists none, or changes them when read."""
    if isinstance(dataset, Subset):
        inner = _label_array(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, np.int64)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    column = _find_key(_features(dataset), COLUMNS)
    readers: list[Callable[[], Any]] = [lambda: dataset.targets, lambda: dataset.labels]
    for read in [lambda: dataset[column]] if column else readers:
        try:
            labels = np.asarray(read())
        except (AttributeError, TypeError, ValueError, LookupError):
            continue
        if labels.ndim == 1 and labels.dtype.kind in "iu":
            return labels.astype(np.int64)
    return None


def _to_rgb(image: Any, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a PIL image, an array or a tensor; grey is repeated."""
    if isinstance(image, Image.Image):
        return to_rgb(image, name)
    channels_first = isinstance(image, Tensor)
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels, channels_first = pixels[..., None], False
    if pixels.ndim == 3:
        last, first = pixels.shape[2] in (1, 3), pixels.shape[0] in (1, 3)
        if first and (channels_first or not last):
            pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise UnreadableImage(
            f"{name}: got a {pixels.dtype} image of shape {pixels.shape}, expected a PIL image or "
            "uint8 (H, W, 3) or (3, H, W); take the dataset without its transform, or one that "
            "gives floating-point tensors for all images"
        )
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
