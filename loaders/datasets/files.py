"""Encoded images in a folder or an archive."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.errors import UnreadableImage
from letheon.kernels import keyed
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.datasets.tree import Tree
from letheon.loaders.decode import jpeg
from letheon.loaders.decode.encoded_image import EncodedImage, from_file

SAMPLE = 64  # files whose contents enter the digest of a set


class FileImages(ImageSet):
    """The images of a list of files, decoded when read."""

    def __init__(
        self,
        name: str,
        tree: Tree,
        paths: Sequence[str],
        labels: Sequence[int] | NDArray[np.int64],
        classes: Sequence[str],
        root: str = "",
        digest: str = "",
    ) -> None:
        """`paths` are relative to the tree, below `root`, which is left out of the manifest."""
        self.name, self.tree, self.root = name, tree, root
        # One array of bytes: a million str objects would be copied into every forked worker.
        self._paths = np.array([p.encode("utf-8", "surrogateescape") for p in paths], dtype=bytes)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = tuple(classes)
        self._digest = digest

    def file(self, i: int) -> str:
        """The path of image i, relative to the tree."""
        return bytes(self._paths[i]).decode("utf-8", "surrogateescape")

    def path(self, i: int) -> str:
        """The path of image i with that of the folder or archive before it."""
        return self.tree.where(self.file(i))

    def file_bytes(self, i: int) -> bytes:
        """The content of file i; raises `UnreadableImage` naming it."""
        return self.tree.read(self.file(i))

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i decoded; raises `UnreadableImage` naming the file."""
        data = np.frombuffer(self.file_bytes(i), np.uint8)
        return jpeg.pixels(data, self.path(i))

    def encoded_image(self, i: int) -> EncodedImage:
        """The JPEG of image i, or its pixels; raises `UnreadableImage`."""
        return from_file(self.file_bytes(i), self.path(i))

    @property
    def digest(self) -> str:
        """Over the paths and sizes of all files, and the contents of a keyed sample of them."""
        if not self._digest:
            total = hashlib.sha256()
            for i in range(len(self)):
                path = self.file(i)
                line = f"{path.removeprefix(self.root)}\t{self.tree.size(path)}\n"
                total.update(line.encode("utf-8", "surrogateescape"))
            for i in sample_numbers(len(self)):
                total.update(self._content_digest(i))
            self._digest = total.hexdigest()
        return self._digest

    def _content_digest(self, i: int) -> bytes:
        """SHA-256 of file i; a file that cannot be read has a mark of its own."""
        try:
            return hashlib.sha256(self.tree.read(self.file(i))).digest()
        except UnreadableImage:  # whether that is an error is for its reader to say
            return b"unreadable"


def sample_numbers(count: int) -> list[int]:
    """Numbers of the files whose contents enter a digest: all of a few, else `SAMPLE` keyed ones.

    The same everywhere, so that a file replaced by one of its size is met with odds of
    `SAMPLE` / `count`, and another copy of a set, or another order of its files, for certain.
    """
    if count <= SAMPLE:
        return list(range(count))
    drawn = keyed.uniform(0, "digest", 0, torch.arange(SAMPLE), 1)[:, 0]
    return sorted({int(share * count) for share in drawn.tolist()})


class ListedImages(FileImages):
    """Images that a list names; their digest holds the labels too, which the paths do not."""

    @property
    def digest(self) -> str:
        """Over the manifest of paths and sizes, and the labels."""
        total = hashlib.sha256(super().digest.encode())
        total.update(self.labels.astype("<i8").tobytes())
        return total.hexdigest()
