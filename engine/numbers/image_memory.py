"""Decoded images in memory, for the sums and accuracies of several runs of one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from letheon.loaders.backends.base import Backend
from letheon.loaders.batch import Batch, Loader
from letheon.loaders.datasets.image_set import ArrayImages, ImageSet
from letheon.loaders.order import Part
from letheon.loaders.preset import Preset


class ImageMemory:
    """Images as the test transform shows them, each decoded once and kept for the next sweep.

    Sweeps over the forget set, the retain set and all images, in batches of any size, are made of
    the same images. What does not fit in `limit` bytes of the host's memory is decoded each time.
    """

    def __init__(self, limit: int) -> None:
        """Take the limit, in bytes."""
        self.limit = limit
        self._sets: dict[tuple[ImageSet, Preset], dict[int, Tensor]] = {}
        """By number: (C, H, W), in the memory format of its batch."""

    def sweep(
        self, loader: Loader, indices: Sequence[int] | None = None, skip: int = 0
    ) -> Iterator[Batch]:
        """Yield what `loader.sweep` yields, bitwise; images that are here are not read again."""
        if not isinstance(loader, Backend) or isinstance(loader.source, ArrayImages):
            yield from loader.sweep(indices, skip)
            return
        images = self._sets.setdefault((loader.images, loader.preset), {})
        parts = loader.sweep_parts(indices)[skip:]
        missing = [_without(images, part) for part in parts]
        wanted = [part for part in missing if len(part.samples)]
        read = loader.read_parts(wanted) if wanted else iter(())
        for part, rest in zip(parts, missing, strict=True):
            if not len(rest.samples):
                yield _batch(loader, images, part)
                continue
            batch = next(read)
            new = dict(zip(rest.samples.tolist(), batch.images, strict=True))
            if len(rest.samples) < len(part.samples):
                batch = _batch(loader, images | new, part)
            size = sum(image.numel() * image.element_size() for image in new.values())
            if batch.images.device.type == "cpu" and size <= self.limit:
                self.limit -= size
                images |= new
            yield batch


def _without(images: Mapping[int, Tensor], part: Part) -> Part:
    """The samples of a part that are not among the images."""
    kept = np.array([i not in images for i in part.samples.tolist()], np.bool_)
    return Part(part.samples[kept], part.turn[kept], part.total)


def _batch(loader: Backend, images: Mapping[int, Tensor], part: Part) -> Batch:
    """The batch of a part, as the loader makes it: in its memory format, on the host."""
    samples = part.samples
    rows = [images[i] for i in samples.tolist()]
    last = rows[0].stride(0) == 1 and not rows[0].is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return Batch(
        torch.stack(rows).contiguous(memory_format=layout),
        torch.from_numpy(loader.images.labels[samples]),
        torch.from_numpy(loader.forget[samples]),
        torch.from_numpy(samples),
        part.total,
    )
