"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the original binaries, and the Python version.

A record of the binaries is one label byte (CIFAR-100: coarse, then fine; the fine one is read) and
3072 bytes, the red, green and blue planes of 32 x 32 pixels. The Python version, the only form
that torchvision fetches, is a pickle of the same bytes; it is read without running code
(`restricted_pickle`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.loaders.datasets.image_set import ArrayImages, Data
from letheon.loaders.datasets.restricted_pickle import load_restricted
from letheon.loaders.datasets.tree import Tree

PIXELS = 3 * 32 * 32
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


class _Form(NamedTuple):
    """One way in which a CIFAR is published: its files, and how labels are kept."""

    train: tuple[str, ...]
    test: str
    names: str  # the file of the class names
    labels: str | int  # the pickle's key, or the bytes before the pixels


FORMS = (
    _Form(tuple(f"{batch}.bin" for batch in BATCHES), "test_batch.bin", "batches.meta.txt", 1),
    _Form(("train.bin",), "test.bin", "fine_label_names.txt", 2),
    _Form(BATCHES, "test_batch", "batches.meta", "labels"),
    _Form(("train",), "test", "meta", "fine_labels"),
)


def read_cifar(tree: Tree) -> Data | None:
    """The data if `tree` holds CIFAR's files, else None.

    Raises:
        InputError: A missing file, one cut short, or a pickle that holds something else.
    """
    at = {path.rpartition("/")[2]: path for path in tree.files}
    for form in FORMS:
        if form.train[0] in at and (len(form.train) > 1 or {form.test, form.names} <= set(at)):
            return _read(tree, at, form)
    return None


def _read(tree: Tree, at: dict[str, str], form: _Form) -> Data:
    missing = [name for name in (*form.train, form.test, form.names) if name not in at]
    if missing:
        raise InputError(
            f"{tree.root}: got CIFAR's files without {missing[0]}, expected all; fetch it again"
        )
    classes = _class_names(tree, at[form.names], form)
    sets = []
    for split, files in (("train", form.train), ("test", (form.test,))):
        parts = [_records(tree, at[file], form.labels) for file in files]
        planes = np.concatenate([planes for planes, _ in parts]).reshape(-1, 3, 32, 32)
        pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
        labels = np.concatenate([labels for _, labels in parts])
        sets.append(ArrayImages(f"cifar{len(classes)}/{split}", pixels, labels, classes))
    return Data(sets[0], sets[1], tuple((name,) for name in classes))


def _class_names(tree: Tree, path: str, form: _Form) -> list[str]:
    if isinstance(form.labels, int):
        return tree.read(path).decode("utf-8", "replace").split()
    key = "label_names" if form.labels == "labels" else "fine_label_names"
    names = _entry(_load(tree, path), key, tree.where(path))
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise _unlike(tree.where(path), f"a list of {key}")
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names]


def _records(
    tree: Tree, path: str, labels: str | int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 3072) planes and (N,) labels of one file."""
    if isinstance(labels, int):
        raw = np.frombuffer(tree.read(path), dtype=np.uint8)
        if not raw.size or raw.size % (PIXELS + labels):
            raise InputError(
                f"{tree.where(path)}: got {raw.size} bytes, expected whole records of "
                f"{PIXELS + labels}; fetch it again"
            )
        records = raw.reshape(-1, PIXELS + labels)
        return records[:, labels:], records[:, labels - 1].astype(np.int64)
    where = tree.where(path)
    batch = _load(tree, path)
    planes, numbers = _entry(batch, "data", where), _entry(batch, labels, where)
    if not (
        isinstance(planes, np.ndarray)
        and planes.dtype == np.uint8
        and planes.ndim == 2
        and planes.shape[1] == PIXELS
        and isinstance(numbers, list | np.ndarray)
        and len(numbers) == len(planes)
        and all(isinstance(number, int | np.integer) for number in numbers)
    ):
        raise _unlike(where, f"(N, {PIXELS}) bytes of data and N {labels}")
    return planes, np.array([int(number) for number in numbers], np.int64)


def _load(tree: Tree, path: str) -> dict[Any, Any]:
    loaded = load_restricted(tree.read(path), tree.where(path))
    if not isinstance(loaded, dict):
        raise _unlike(tree.where(path), "a dict")
    return loaded


def _entry(batch: dict[Any, Any], key: str, where: str) -> Any:
    for spelled in (key.encode(), key):
        if spelled in batch:
            return batch[spelled]
    raise _unlike(where, f"an entry {key!r}")


def _unlike(where: str, what: str) -> InputError:
    return InputError(f"{where}: got another pickle, expected CIFAR's with {what}; fetch it again")
