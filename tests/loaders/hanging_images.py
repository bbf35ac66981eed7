"""Images that are read until a number, and then never: helpers that hang, for `test_stopping`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np

from letheon.launch import prepare
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.preset import Preset

COUNT = 600


class HangingImages(ArrayImages):
    """Leaves its process's number in a folder when it begins to hang."""

    def __init__(self, folder: Path, limit: int = COUNT) -> None:
        pixels = np.arange(COUNT * 8 * 8 * 3, dtype=np.uint32).astype(np.uint8)
        super().__init__("set", pixels.reshape(COUNT, 8, 8, 3), np.arange(COUNT) % 2, ["a", "b"])
        self.folder, self.limit, self.reads = folder, limit, 0

    def read(self, i: int) -> np.ndarray:
        if i >= self.limit:
            (self.folder / str(os.getpid())).touch()
            while True:
                signal.pause()
        self.reads += 1
        return super().read(i)

    def read_many(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([self.read(int(i)) for i in indices])


def main(folder: Path, out: Path, loader: bool) -> None:
    """Prepare the images by one process, with a loader's worker beside it where asked."""
    images = HangingImages(folder, 300)
    prepare.open_source = lambda path: {"set": images}
    if loader:
        preset = Preset(size=8, resize_to=8)
        reader = Reader(0, workers=1)
        batches = TorchLoader(images, np.zeros(COUNT, np.bool_), preset, 150, reader).sweep()
        next(batches)
    sys.argv = ["prepare.py", "--source", "x", "--out", str(out), "--workers", "1"]
    prepare.start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "loader")
