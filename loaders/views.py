"""Views of image sets: under other labels, or without the images that cannot be read.

A model's class numbering may be wider than a set's: ten ImageNet classes before a 1000-way network.

Where the user wants unreadable images left out, every image is decoded once before the run, so the
set has its final size from the start: batches are full, `Batch.total` is right, and nothing depends
on the number of ranks, who share out the reading. An image that breaks later is an error that names
it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError, UnreadableImage, suggest
from letheon.loaders.datasets import imagenet
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ArrayImages, Data, ImageSet
from letheon.loaders.datasets.layouts import NONE_HELD_OUT
from letheon.loaders.decode.encoded_image import EncodedImage
from letheon.loaders.shared_work import share_work, spans
from letheon.progress import Line
from letheon.regular import read_text

CHUNK = 64  # images of one task of a thread, at most
SPAN = 1024  # images of one task of a rank


class RelabeledImages(ImageSet):
    """The same images under other label numbers; class k of the result may have no image here."""

    def __init__(
        self, images: ImageSet, classes: tuple[str, ...], names: Mapping[str, str] | None = None
    ) -> None:
        """`classes` holds every class of `images`, by its name or what `names` has for it."""
        place = {name: number for number, name in enumerate(classes)}
        called = [(names or {}).get(name, name) for name in images.classes]
        table = np.array([place[name] for name in called], dtype=np.int64)
        self.images = images
        self.name, self.left_out, self.notes = images.name, images.left_out, images.notes
        self.classes = classes
        self._table = table
        self.labels = table[images.labels]

    @property
    def true_labels(self) -> NDArray[np.int64]:
        """(N,) labels before canaries were planted, in this numbering."""
        return self._table[self.images.true_labels]

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

    def read_encoded(self, indices: NDArray[np.int64]) -> Sequence[EncodedImage | UnreadableImage]:
        """The images of `indices` as the original set keeps them."""
        return self.images.read_encoded(indices)

    def path(self, i: int) -> str:
        """What image i is called in messages."""
        return self.images.path(i)


class PlantedImages(RelabeledImages):
    """The same images, some of them under a wrong label of the same classes: the canaries."""

    def __init__(
        self, images: ImageSet, numbers: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> None:
        """`numbers` (n,) are of the images whose label becomes that of `labels` (n,)."""
        super().__init__(images, images.classes)
        self.labels = self.labels.copy()
        self.labels[numbers] = labels

    @property
    def digest(self) -> str:
        """Over the images' own and all labels."""
        total = hashlib.sha256(self.images.digest.encode())
        total.update(self.labels.astype("<i8").tobytes())
        return total.hexdigest()


def model_classes(
    named: tuple[str, ...] | None, count: int, data: tuple[str, ...]
) -> tuple[str, ...]:
    """The names of a model's `count` classes, before a data set with classes `data`.

    A model that names its classes is believed. One of a thousand classes has ImageNet's where the
    data are folders of WordNet ids or of ImageNet's words; else it has the data's where the counts
    agree.

    Raises:
        InputError: neither fits.
    """
    if named is not None:
        return named
    wnids = tuple(imagenet.words())
    if count == len(wnids) and imagenet.find_ids(data) is not None:
        return wnids
    if count == len(data):
        return data
    raise InputError(
        f"got a model of {count} classes for data of {len(data)} ({', '.join(data[:3])}, ...); "
        "expected equal counts, or an ImageNet model and WordNet ids or words; use the model's own "
        "data, or list its classes in order in a file",
        option="classes",
    )


def align_labels(data: Data, classes: tuple[str, ...], assumed: bool = False) -> Data:
    """`data` with labels in the numbering of `classes`; itself where that is its own.

    Where the model does not name its classes (`assumed`), a note says which order is taken.

    Raises:
        InputError: the data has a class that the model does not know.
    """
    if assumed and set(classes) != set(imagenet.words()):
        _add_note(
            data,
            "the model does not name its classes: they are taken in the order of the class folders "
            f"({', '.join(classes[:3])}, ...), numbers by value, others sorted as text; for "
            "another order list them in a file and name it with the setting classes",
        )
    if data.classes == classes:
        return data
    ids = imagenet.find_ids(data.classes) or {}
    unknown = sorted(name for name in data.classes if name not in classes)
    called = {name: ids[name] for name in unknown if ids.get(name) in classes}
    unknown = [name for name in unknown if name not in called]
    if unknown:
        raise InputError(
            f"got {data.train.name} with class {unknown[0]!r} ({len(unknown)} such classes), which "
            f"the model does not know; it knows {len(classes)} ({', '.join(classes[:3])}, ...)"
            f"{suggest(unknown[0], classes)}; give the data it was trained on"
        )
    if called:
        _add_note(
            data, "class folders are named by ImageNet's words: labels are in ImageNet's order"
        )
    words = imagenet.words()
    known = {
        called.get(c, c): (called[c], *names) if c in called else names
        for c, names in zip(data.classes, data.names, strict=True)
    }
    names = tuple(known.get(c, (c, words[c]) if c in words else (c,)) for c in classes)
    train = RelabeledImages(data.train, classes, called)
    test = train if data.test is data.train else RelabeledImages(data.test, classes, called)
    return Data(train, test, names, data.notes)


def order_classes(data: Data, file: str) -> Data:
    """`data` with its classes in the order of the lines of `file`: a class folder's name each.

    A line may go on after the name, as in ``n01440764 tench``. Lines of no class folder are classes
    without images.

    Raises:
        InputError: The file cannot be read, names a class twice, or lacks one of the data's.
    """
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"got the classes {file}, which cannot be read ({error}), expected a text file with "
            "one class a line; check the path",
            option="classes",
        ) from None
    known = set(data.classes)
    names = [line.strip() for line in lines if line.strip()]
    names = [name if name in known else _first_known(name, known) for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    missing = sorted(known - set(names))
    if twice or missing:
        wrong = f"{twice[0]!r} twice" if twice else f"no line for {missing[0]!r}"
        raise InputError(
            f"got the classes {file} with {wrong}, expected each of the {len(known)} class folders "
            "once, in the model's order; mend the file",
            option="classes",
        )
    return align_labels(data, tuple(names))


def _first_known(line: str, known: set[str]) -> str:
    words = re.split(r"[\s,]+", line)
    return words[0] if words[0] in known else line


def _add_note(data: Data, note: str) -> None:
    if note not in data.train.notes:
        data.train.notes = (*data.train.notes, note)


class SubsetImages(ImageSet):
    """Some images of a set under new numbers 0..n-1, in the old order; the classes stay."""

    def __init__(
        self, images: ImageSet, numbers: NDArray[np.int64], left_out: Sequence[str] = ()
    ) -> None:
        """`numbers` are of the images that are in, sorted; `left_out` says why others are not."""
        self.images = images
        self.numbers = numbers  # (n,)
        self.name, self.classes, self.notes = images.name, images.classes, images.notes
        self.labels = images.labels[numbers]
        self.left_out = (*images.left_out, *left_out)

    @property
    def true_labels(self) -> NDArray[np.int64]:
        """(n,) labels before canaries were planted."""
        return self.images.true_labels[self.numbers]

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

    def read_encoded(self, indices: NDArray[np.int64]) -> Sequence[EncodedImage | UnreadableImage]:
        """The images of `indices` as the original set keeps them."""
        return self.images.read_encoded(self.numbers[indices])

    def path(self, i: int) -> str:
        """What image i is called in messages: its old name."""
        return self.images.path(int(self.numbers[i]))


def hold_out(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Divide a set into train and test: of each class the `share` whose names come first by hash.

    Which images these are follows from `seed` and their names alone: it is the same on every rank
    and machine, and an image that is added moves no other but at the border. Folders above the set
    do not count. Images without files of their own (arrays, `.beton`, tables) go by their numbers.
    At least one image of a class is on either side.

    Raises:
        InputError: A share outside 0..1, or a class of a single image.
    """
    if not 0 < share < 1:
        raise InputError(f"got the share {share}, expected one between 0 and 1", option="holdout")
    counts = np.bincount(images.labels, minlength=len(images.classes))
    if (counts == 1).any():
        raise InputError(
            f"{images.name}: got the class {images.classes[int(np.argmax(counts == 1))]!r} of one "
            "image, expected two or more to hold one out; add images or remove the class",
            option="holdout",
        )
    keys = [
        hashlib.sha256(
            f"{seed}\0{_own_name(images, i)}".encode("utf-8", "surrogateescape")
        ).digest()
        for i in range(len(images))
    ]
    order = np.array(sorted(range(len(images)), key=keys.__getitem__))
    test = np.zeros(len(images), np.bool_)
    for label in np.flatnonzero(counts):
        members = order[images.labels[order] == label]
        test[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    train = SubsetImages(images, np.flatnonzero(~test))
    held = SubsetImages(images, np.flatnonzero(test))
    train.name, held.name = f"{images.name}/train", f"{images.name}/test"
    return train, held


def divide_data(data: Data, share: float, seed: int) -> Data:
    """Hold out a share of images that have no test split, see `hold_out`, and note how many.

    Raises:
        InputError: As `hold_out`, or they have one.
    """
    if data.test is not data.train:
        raise InputError(
            f"got a share of {share} to hold out of {data.train.name}, which has a test split, "
            "expected training images alone; leave it out",
            option="holdout",
        )
    train, test = hold_out(data.train, share, seed)
    note = f"{len(test)} of {len(data.train)} images are held out (share {share}, seed {seed})"
    notes = (*(old for old in data.notes if old != NONE_HELD_OUT), note)
    train.notes = (*(old for old in train.notes if old != NONE_HELD_OUT), note)
    return Data(train, test, data.names, notes)


def _own_name(images: ImageSet, i: int) -> str:
    """What image i is called in its set, wherever the set lies and however it is packed."""
    return images.file(i).removeprefix(images.root) if isinstance(images, FileImages) else str(i)


def drop_unreadable(images: ImageSet) -> ImageSet:
    """`images` without those that cannot be read; itself where all can.

    Takes this process's share of the machine's cores; the ranks that start a job together read a
    share of the images each. Arrays in memory are taken as they are; those of a prepared set are
    read, as their bytes may be damaged.

    Raises:
        InputError: None can be read.
    """
    if type(images) is ArrayImages:
        return images
    world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    label = f"reading {images.name} once"
    line = Line(label, len(images), os.environ.get("RANK", "0") == "0")

    def reach(number: int) -> None:  # the ranks read on at about the same pace
        line.advance(number - line.done, number - line.done)

    with ThreadPoolExecutor(threads, "readable") as pool:

        def find(span: range) -> dict[int, str]:
            broken: dict[int, str] = {}
            for part in pool.map(partial(_unreadable, images), _cut(span, threads)):
                broken |= part
            reach(span.stop)
            return broken

        parts = share_work(label, spans(len(images), SPAN), find)
    reach(len(images))
    line.close()
    found = {number: why for part in parts for number, why in part.items()}
    if not found:
        return images
    if len(found) == len(images):
        raise InputError(f"none of the {len(images)} images can be read; first: {found[0]}")
    numbers = np.setdiff1d(np.arange(len(images)), list(found))
    readable = SubsetImages(images, numbers, [found[i] for i in sorted(found)])
    lost = np.setdiff1d(images.labels, readable.labels)
    if len(lost):
        raise InputError(
            f"{images.name}: got the class {images.classes[lost[0]]!r} of which no image can be "
            f"read, expected at least one; mend it; first: {next(iter(found.values()))}"
        )
    return readable


def _cut(span: range, threads: int) -> list[range]:
    """Cut a span into parts for threads: at least four each, so that all have work to the end."""
    size = max(1, min(CHUNK, len(span) // (4 * threads)))
    return [span[start : start + size] for start in range(0, len(span), size)]


def _unreadable(images: ImageSet, span: range) -> dict[int, str]:
    """Those of the images of `span` that cannot be read, and why."""
    found = {}
    for i in span:
        try:
            (one,) = images.read_encoded(np.array([i]))
            if isinstance(one, UnreadableImage):
                raise one
            one.pixels()
        except UnreadableImage as error:
            found[i] = str(error)
    return found


def list_notes(sets: Mapping[str, ImageSet]) -> list[str]:
    """Lines for the user: how each set was read, and of which something was left out."""
    notes = dict.fromkeys(note for images in sets.values() for note in images.notes)
    return [*notes] + [
        f"left out {len(images.left_out)} unreadable of {len(images.left_out) + len(images)} "
        f"images of {name}: {'; '.join(images.left_out)}"
        for name, images in sets.items()
        if images.left_out
    ]


def unwrap(images: ImageSet) -> tuple[ImageSet, NDArray[np.int64]]:
    """The set itself, below other labels and choices, and the number in it of each image."""
    numbers = np.arange(len(images))
    while isinstance(images, RelabeledImages | SubsetImages):
        if isinstance(images, SubsetImages):
            numbers = images.numbers[numbers]
        images = images.images
    return images, numbers
