"""Threads that decode the crop alone, from `.beton` files, folders and archives: the default.

Three things make it fast on a core: only the units of the JPEG that the crop touches are decoded
(`turbo`); the resize is torch's vectorised one on bytes; the bytes of a file are mapped, never
copied, and the memory of a batch is used again. The threads spend their time in C, outside the
interpreter's lock. Pixels are the plain loader's to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import UnreadableImage
from letheon.loaders.backends.base import AHEAD, Backend
from letheon.loaders.backends.memory import Buffers
from letheon.loaders.batch import Batch
from letheon.loaders.decode import jpeg
from letheon.loaders.decode.encoded_image import EncodedImage
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.order import Part
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment
from letheon.loaders.transforms.decode_rows import fill
from letheon.loaders.transforms.normalize import normalize_on

ROWS = 16  # images of one task: few enough to share out a small batch, many for numpy's overhead


class _Job(NamedTuple):
    """A batch in the making."""

    part: Part
    images: Tensor  # (B, S, S, 3), float32 for the host, pinned uint8 for a device
    u: NDArray[np.float64] | None  # (B, D) draws; None: test transform


class BetonLoader(Backend):
    """`Loader` over any `ImageSet`, made for `BetonImages` and `FileImages`: `workers` threads.

    With 0 workers the caller's thread decodes. Images are float32; for a CUDA device they cross as
    bytes and are normalised there. Threads and buffers end with the iterator, also when it is left
    early (closed or dropped).

    Attributes:
        scaled: decode crops of at least twice the wanted size at half the scale: a tenth faster at
            128 pixels from 500, nothing at 224; else all pixels are the plain loader's to the bit.
        codec: JPEG library; None takes the fastest there is.
    """

    def __init__(
        self,
        *args: Any,
        scaled: bool = False,
        codec: jpeg.Codec | None = None,
        **kwargs: Any,
    ) -> None:
        """As `Backend`."""
        super().__init__(*args, **kwargs)
        self.scaled, self.codec = scaled, codec
        self._buffers = Buffers(keep=AHEAD + 2)

    def make_batches(self, parts: list[Part], epoch: int | None, preset: Preset) -> Iterator[Batch]:
        """Yield the batches of `parts`; see `Backend`."""
        if not self.workers:
            for part in parts:
                job = self._job(part, epoch, preset)
                starts = range(0, len(part.samples), ROWS)
                for start in starts:
                    self._fill(job, start, preset)
                yield self._finish_job(job, preset)
            return
        # One thread each: torch would start a team of its own in every one of ours.
        pool = ThreadPoolExecutor(self.workers, "decode", torch.set_num_threads, (1,))
        waiting: deque[tuple[_Job, list[Future[None]]]] = deque()
        try:
            for k in range(len(parts) + AHEAD):
                if k < len(parts):
                    job = self._job(parts[k], epoch, preset)
                    starts = range(0, len(parts[k].samples), ROWS)
                    tasks = [pool.submit(self._fill, job, start, preset) for start in starts]
                    waiting.append((job, tasks))
                if k >= AHEAD and waiting:
                    job, tasks = waiting.popleft()
                    for task in tasks:
                        task.result()
                    yield self._finish_job(job, preset)
        finally:
            pool.shutdown(cancel_futures=True)

    def _job(self, part: Part, epoch: int | None, preset: Preset) -> _Job:
        samples, turn, _ = part
        if isinstance(self.source, BetonImages):
            self.source.will_need(self.numbers[samples])
        shape = (len(samples), preset.size, preset.size, 3)
        if self.device.type == "cpu":
            images = self._buffers.take(shape, np.float32)
        else:
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        u = None
        if epoch is not None:
            u = augment.draws(self.seed, epoch, turn, samples, preset)
        return _Job(part, images, u)

    def _fill(self, job: _Job, start: int, preset: Preset) -> None:
        """Make `ROWS` rows of the batch from `start`; raises `InputError` naming an image."""
        rows = slice(start, start + ROWS)
        encoded = self.read_encoded(job.part.samples[rows])
        u = None if job.u is None else job.u[rows]
        fill(job.images[rows], encoded, u, preset, self.scaled, self.codec)

    def read_encoded(self, samples: NDArray[np.int64]) -> Sequence[EncodedImage | UnreadableImage]:
        """Each of `samples` as it is kept, or why it is unreadable."""
        return self.source.read_encoded(self.numbers[samples])

    def _finish_job(self, job: _Job, preset: Preset) -> Batch:
        if self.device.type == "cpu":
            return self._finish(job.images.permute(0, 3, 1, 2), job.part)
        return self._finish(normalize_on(job.images, preset, self.device), job.part)
