"""The original binaries of CIFAR-10 and CIFAR-100 (Krizhevsky 2009).

A record is one label byte (CIFAR-100: coarse, then fine; the fine one is read) and 3072 bytes, the
red, green and blue planes of 32 x 32 pixels. The Python version of the files is a pickle,
which runs code when it is opened: it is refused.
"""

from __future__ import annotations

import numpy as np

from letheon.errors import InputError
from letheon.loaders.datasets.image_set import ArrayImages, Data
from letheon.loaders.datasets.tree import Tree

PIXELS = 3 * 32 * 32
BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))


def read_cifar(tree: Tree) -> Data | None:
    """The data if `tree` holds the binaries, else None.

    Raises:
        InputError: The pickled version, a missing file, or one cut short.
    """
    at = {path.rpartition("/")[2]: path for path in tree.files}
    if "data_batch_1.bin" in at:
        train, test, names, label_bytes = BATCHES, "test_batch.bin", "batches.meta.txt", 1
    elif {"train.bin", "test.bin", "fine_label_names.txt"} <= set(at):
        train, test, names, label_bytes = ("train.bin",), "test.bin", "fine_label_names.txt", 2
    elif "data_batch_1" in at or {"train", "test", "meta"} <= set(at):
        raise InputError(
            f"{tree.root}: got CIFAR's Python version, which is a pickle and is not opened, "
            "expected the binary version; fetch cifar-10-binary.tar.gz or cifar-100-binary.tar.gz"
        )
    else:
        return None
    missing = [name for name in (*train, test, names) if name not in at]
    if missing:
        raise InputError(
            f"{tree.root}: got CIFAR's binaries without {missing[0]}, expected all; fetch it again"
        )
    classes = tree.read(at[names]).decode().split()
    sets = []
    for split, files in (("train", train), ("test", (test,))):
        parts = []
        for file in files:
            raw = np.frombuffer(tree.read(at[file]), dtype=np.uint8)
            if not raw.size or raw.size % (PIXELS + label_bytes):
                raise InputError(
                    f"{tree.where(at[file])}: got {raw.size} bytes, expected whole records of "
                    f"{PIXELS + label_bytes}; fetch it again"
                )
            parts.append(raw.reshape(-1, PIXELS + label_bytes))
        records = np.concatenate(parts)
        planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
        labels = records[:, label_bytes - 1].astype(np.int64)
        sets.append(ArrayImages(f"cifar{len(classes)}/{split}", pixels, labels, classes))
    return Data(sets[0], sets[1], tuple((name,) for name in classes))
