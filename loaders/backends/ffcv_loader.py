"""The ffcv package's reader, compiled decoder and C code, under a loop of ours.

Its own `Loader` is left out, for what cannot be mended from outside (ffcv 1.0.2):

- a random order for several ranks is a sampler with padding, the quasi-random one refuses them:
  order and batches here are those of every backend
- crops come from numba's generator of each thread, which no seed reaches: boxes and mirrors are
  given to the decoder
- return codes of the decoder are thrown away, so a truncated image trains as grey: they are
  looked at here, and Pillow judges what failed
- buffers for a decoded image per sample and slot, made anew each epoch: here one scratch of
  `ROWS` images that stays
- an iterator left early keeps its thread and buffers: here the thread ends with the iterator
- tables of all samples in Python dicts, 0.6 GB a rank for ImageNet: here two sorted arrays
- the number of threads of torch and numba is set for the whole process: it is put back

Resized by area averaging (OpenCV's INTER_AREA) from boxes in whole pixels.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.errors import InputError, UnreadableImage
from letheon.loaders.backends.base import prefetch
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.batch import Batch
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.order import Part
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment, crop_boxes
from letheon.loaders.transforms.decode_rows import fill
from letheon.loaders.transforms.normalize import normalize, normalize_on

_NUMBA = threading.Lock()  # its simplest thread pool ends the process if two threads call it
ROWS = 32  # images decoded at once, each with room for the largest of the set


def is_installed() -> bool:
    """Whether the ffcv package can be imported."""
    return importlib.util.find_spec("ffcv") is not None


class FfcvLoader(BetonLoader):
    """`Loader` over a `BetonImages` by the ffcv package, with `workers` threads (at least one).

    The first batch waits for numba to compile, seconds. Images are float32. The test transform is
    `BetonLoader`'s, so an evaluation does not depend on the loader.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `BetonLoader`.

        Raises:
            InputError: ffcv is not installed, the images are not in a `.beton`, or the preset
                needs more than a box of each image.
        """
        super().__init__(*args, **kwargs)
        if not is_installed():
            raise InputError(
                "got the loader ffcv, and the ffcv package is not installed, expected it; run "
                "`make ffcv` (Python 3.11), or use the loader beton",
                option="loader",
            )
        if not isinstance(self.source, BetonImages):
            raise InputError(
                f"{self.images.name}: got images that are not in a .beton file, which ffcv wants; "
                "prepare one, or use the loader torch",
                option="loader",
            )
        crop_boxes.check(self.preset, "ffcv")
        self._source: BetonImages = self.source
        self._scratch = np.empty((0, 0), np.uint8)
        self._decode: Callable[..., Any] | None = None

    def make_batches(self, parts: list[Part], epoch: int | None, preset: Preset) -> Iterator[Batch]:
        """Yield the batches of `parts`; see `Backend`."""
        if epoch is None:
            return super().make_batches(parts, None, preset)
        crop_boxes.check(preset, "ffcv")
        return prefetch(lambda part: self._batch(part, epoch, preset), parts)

    def _batch(self, part: Part, epoch: int, preset: Preset) -> Batch:
        images = self._pixels(part, epoch, preset)
        if self.device.type == "cpu":
            return self._finish(normalize(images, preset), part)
        return self._finish(normalize_on(torch.from_numpy(images), preset, self.device), part)

    def _pixels(self, part: Part, epoch: int, preset: Preset) -> NDArray[np.uint8]:
        """(B, S, S, 3); runs in the one thread that calls numba's."""
        for damage in self.read_encoded(part.samples):  # by digest; nothing is decoded here
            if isinstance(damage, UnreadableImage):
                raise damage
        places = self.numbers[part.samples]
        rows = self._source.table[places]
        shapes = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
        u = augment.draws(self.seed, epoch, part.turn, part.samples, preset)
        cut, mirror = augment.boxes(u, shapes), augment.mirror_mask(u, preset)
        out = np.empty((len(rows), preset.size, preset.size, 3), np.uint8)
        codes = np.zeros(len(rows), np.int64)
        decode = self._compile()
        importlib.import_module("numba").set_num_threads(max(1, self.workers))  # of this thread
        samples = places.astype(np.uint64)
        for start in range(0, len(rows), ROWS):
            now = slice(start, start + ROWS)
            memory = (out[now], self._scratch, cut[now], mirror[now], codes[now])
            with _NUMBA:
                decode(samples[now], memory, self._metadata, self._state)
        # Where ffcv's decoder complained, Pillow judges; some warnings are harmless.
        doubtful = np.flatnonzero(codes)
        again = torch.from_numpy(out[doubtful])
        fill(again, self.read_encoded(part.samples[doubtful]), u[doubtful], preset, codec="pillow")
        out[doubtful] = again.numpy()
        return out

    def _compile(self) -> Callable[..., Any]:
        if self._decode is not None:
            return self._decode
        threads = max(1, self.workers)
        before = torch.get_num_threads()
        compiler = importlib.import_module("ffcv.pipeline.compiler").Compiler
        lib = importlib.import_module("ffcv.libffcv")
        reader = importlib.import_module("ffcv.reader").Reader(str(self._source.file))
        cache = importlib.import_module("ffcv.memory_managers.os_cache").OSCacheManager
        torch.set_num_threads(before)  # importing ffcv sets it to one
        compiler.num_threads = threads  # what `compile` looks at
        manager = cache.__new__(cache)  # without the tables of its constructor
        order = np.argsort(reader.alloc_table["ptr"])
        manager.reader = reader
        manager.ptrs = np.ascontiguousarray(reader.alloc_table["ptr"][order])
        manager.sizes = np.ascontiguousarray(reader.alloc_table["size"][order])
        field = f"f{self._source.image_field}"
        self._metadata = reader.metadata[field]
        self._state = (np.memmap(self._source.file, np.uint8, "r"), manager.ptrs, manager.sizes)
        largest = int(
            (self._source.table["width"].astype(np.int64) * self._source.table["height"]).max()
        )
        self._scratch = np.empty((ROWS, 3 * largest), np.uint8)
        self._decode = compiler.compile(_decoder(compiler, lib, manager.compile_reader()))
        return self._decode


def _decoder(compiler: Any, lib: Any, read: Any) -> Callable[..., None]:
    """What ffcv's random-crop decoder does, with boxes from outside and codes to the outside."""
    imdecode, resize = compiler.compile(lib.imdecode), compiler.compile(lib.resize_crop)
    each = compiler.get_iterator()

    def decode(samples: Any, memory: Any, metadata: Any, storage: Any) -> None:
        out, scratch, cut, mirror, codes = memory
        for k in each(len(samples)):
            row = metadata[samples[k]]
            data = read(row["data_ptr"], storage)
            height, width = np.uint32(row["height"]), np.uint32(row["width"])
            if row["mode"] == 0:
                image = scratch[k][: 3 * height * width].reshape(height, width, 3)
                codes[k] = imdecode(
                    data, image, height, width, height, width, 0, 0, 1, 1, False, False
                )
            else:
                image = data.reshape(height, width, 3)
            top, left, h, w = cut[k]
            resize(image, top, top + h, left, left + w, out[k])
            if mirror[k]:  # pixel by pixel: numba fuses a reversed copy into the assignment
                size = out.shape[1]
                for y in range(size):
                    for x in range(size // 2):
                        for c in range(3):
                            kept = out[k, y, x, c]
                            out[k, y, x, c] = out[k, y, size - 1 - x, c]
                            out[k, y, size - 1 - x, c] = kept

    decode.is_parallel = True  # type: ignore[attr-defined]
    return decode
