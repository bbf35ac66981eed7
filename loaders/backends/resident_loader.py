"""Images that lie in device memory as bytes; cut, resized, mirrored and normalised there.

For sets that fit, and for a part of one that does not: the forget set of a large training set is
kept, and what is not kept is decoded on the host as it is needed. One kernel call makes a batch.
A set that fits on all ranks together may be shared out: each rank keeps every world-th image, and
makes the rows of these for whichever rank's batch they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import InputError, UnreadableImage
from letheon.kernels.augment import Filter, crop_resize_normalize
from letheon.loaders.backends.memory import free_bytes, to_device
from letheon.loaders.backends.rank_exchange import answer_requests, gather_objects
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.batch import Batch
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.decode.encoded_image import EncodedImage
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.encoding import shrink
from letheon.loaders.order import Part
from letheon.loaders.preset import ALTERNATE, CROP, Preset
from letheon.loaders.transforms import augment, crop_boxes, geometry
from letheon.loaders.transforms.decode_rows import fill
from letheon.loaders.transforms.normalize import normalize_on

SHARE = 0.8  # of the free memory; the rest is for the batches
CHUNK = 256  # images decoded between two copies to the device


class ResidentLoader(BetonLoader):
    """`Loader` whose kept images lie on the device; `workers` threads decode them once.

    Boxes are drawn for the original sizes and scaled to the kept ones, so the augmentation is that
    of every backend. Presets without a resized crop are kept in their test geometry, and their
    batches are the plain loader's to float32 rounding.

    Attributes:
        keep: (N,) bool, what lies on the device; by default everything.
        side: longer sides are made this long; None keeps the images as they are. The test
            transform then reads the originals, so that a sweep does not depend on this.
        filter: of the resize: `bilinear` is the plain loader's, before its rounding.
    """

    def __init__(
        self,
        *args: Any,
        keep: NDArray[np.bool_] | None = None,
        side: int | None = None,
        filter: Filter = "bilinear",
        tell: Callable[[str], object] = lambda text: None,
        **kwargs: Any,
    ) -> None:
        """As `BetonLoader`; `tell` is given one line about the memory before it is taken.

        Raises:
            InputError: The kept images do not fit, or one is unreadable.
        """
        super().__init__(*args, **kwargs)
        self.side, self.filter = side, filter
        self.keep = np.ones(len(self.images), np.bool_) if keep is None else keep
        assert self.keep.shape == (len(self.images),)
        self._box = self.preset.augment == "resized-crop-flip"
        if self._box:
            crop_boxes.check(self.preset, "resident")
        self._kept_preset = self.preset
        kept = np.flatnonzero(self.keep)
        self._slot = np.full(len(self.images), -1, np.int64)
        self._slot[kept] = np.arange(len(kept))
        self._shapes, self._originals = self._sizes(kept)  # (K, 2) each
        height, width = self._shapes.max(axis=0, initial=1).tolist()
        needed, free = len(kept) * height * width * 3, free_bytes(self.device)
        tell(
            f"{len(kept)} of {len(self.images)} images as bytes of {height} x {width}: "
            f"{needed / 2**30:.2f} GiB of {free / 2**30:.2f} GiB free on {self.device}"
        )
        if needed > SHARE * free:
            raise InputError(
                f"got {needed / 2**30:.2f} GiB of images for the loader resident, expected at most "
                f"{SHARE * free / 2**30:.2f} GiB; keep fewer, give a smaller side, or use "
                "the loader beton",
                option="loader",
            )
        self._pixels = _load_pixels(
            self._read, kept, (height, width), self.workers, self.device
        )  # (K, H, W, 3) uint8

    def _sizes(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heights and widths, as kept and as in the set."""
        if not self._box:
            square = np.full((len(samples), 2), self.preset.size)
            return square, square
        if isinstance(self.source, BetonImages):
            rows = self.source.table[self.numbers[samples]]
            originals = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
        elif isinstance(self.source, ArrayImages):
            originals = np.tile(np.array(self.source.pixels.shape[1:3]), (len(samples), 1))
        else:  # every file is opened once for its size, and once more for its pixels
            found = self.read_encoded(samples)
            originals = np.array([_size(one) for one in found], np.int64).reshape(-1, 2)
        if self.side is None:
            return originals, originals
        longer = originals.max(axis=1, keepdims=True)
        smaller = (originals * self.side // longer).clip(1)
        return np.where(longer > self.side, smaller, originals), originals

    def _read(self, i: np.int64) -> NDArray[np.uint8]:
        image = self.images.read(int(i))
        if not self._box:
            return geometry.fit(image, self._kept_preset)
        if self.side is not None and max(image.shape[:2]) > self.side:
            return shrink(image, self.side)
        return image

    def make_batches(self, parts: list[Part], epoch: int | None, preset: Preset) -> Iterator[Batch]:
        """Yield the batches of `parts`; see `Backend`."""
        if self._box != (preset.augment == "resized-crop-flip") or (
            not self._box and preset.size != self._kept_preset.size
        ):
            raise InputError(
                f"got images kept for {self._kept_preset.augment!r} at {self._kept_preset.size} "
                f"pixels, expected that in the preset too, not {preset.augment!r} at "
                f"{preset.size}; make a new loader"
            )
        if epoch is None and self.side is not None:
            return super().make_batches(parts, None, preset)
        return (self._batch(part, epoch, preset) for part in parts)

    def _batch(self, part: Part, epoch: int | None, preset: Preset) -> Batch:
        u = None
        if epoch is not None:
            u = augment.draws(self.seed, epoch, part.turn, part.samples, preset)
        here = self._slot[part.samples] >= 0
        if here.all():
            return self._finish(self._build_rows(part.samples, u, preset), part)
        shape = (len(part.samples), 3, preset.size, preset.size)
        images = torch.empty(shape, device=self.device, memory_format=torch.channels_last)
        images[self._to_device(np.flatnonzero(here))] = self._build_rows(
            part.samples[here], None if u is None else u[here], preset
        )
        rows = np.flatnonzero(~here)
        rest = torch.empty((len(rows), preset.size, preset.size, 3), dtype=torch.uint8)
        fill(
            rest, self.read_encoded(part.samples[rows]), None if u is None else u[rows], preset,
            self.scaled, self.codec,
        )  # fmt: skip
        images[self._to_device(rows)] = normalize_on(rest, preset, self.device)
        return self._finish(images, part)

    def _build_rows(
        self, samples: NDArray[np.int64], u: NDArray[np.float64] | None, preset: Preset
    ) -> Tensor:
        """(B, 3, S, S) on the device, of samples that are kept there."""
        slots = self._slot[samples]
        mirror = np.zeros(len(slots), np.bool_) if u is None else augment.mirror_mask(u, preset)
        source, flip = self._to_device(slots), self._to_device(mirror)
        if self._box:
            originals = self._originals[slots]
            cut = (
                crop_boxes.central(originals, preset) if u is None else augment.boxes(u, originals)
            )
            cut = cut * np.tile(self._shapes[slots] / originals, 2)
            place = self._to_device(cut.astype(np.float32))
            return crop_resize_normalize(
                self._pixels, place, source, flip, preset.size, preset.mean, preset.std,
                filter=self.filter,
            )  # fmt: skip
        pixels = self._pixels[source]
        if u is not None and preset.augment in CROP:
            offsets = self._to_device(augment.offsets(u, preset))
            pixels = _shift(pixels, offsets, preset.margin, preset.augment in ALTERNATE)
        pixels = torch.where(flip[:, None, None, None], pixels.flip(2), pixels)
        return normalize_on(pixels, preset, self.device)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(array), self.device)


def _load_pixels(
    read: Callable[[np.int64], NDArray[np.uint8]],
    samples: NDArray[np.int64],
    shape: tuple[int, int],
    workers: int,
    device: torch.device,
) -> Tensor:
    """(K, H, W, 3) uint8 on the device, of `shape`, each image in the upper left of its row."""
    pixels = torch.empty((len(samples), *shape, 3), dtype=torch.uint8, device=device)
    pool = ThreadPoolExecutor(max(1, workers), "resident", torch.set_num_threads, (1,))
    try:
        for start in range(0, len(samples), CHUNK):
            # Zeroed: what lies beside a smaller image is never read, but should be the same.
            chunk = samples[start : start + CHUNK]
            rows = np.zeros((len(chunk), *shape, 3), np.uint8)
            for row, image in zip(rows, pool.map(read, chunk), strict=True):
                row[: image.shape[0], : image.shape[1]] = image
            pixels[start : start + CHUNK] = torch.from_numpy(rows).to(device)
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels


class ShardedLoader(ResidentLoader):
    """`ResidentLoader` of a set that fits on all ranks together: each keeps every world-th image.

    Every rank must draw the same training batches at the same time. The test transform reads the
    originals on the host.
    """

    shares_pass = False  # where ranks give each other rows, all must draw as many batches

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `ResidentLoader`, without `keep`."""
        images, reader = args[0], args[4]
        self._owner = np.arange(len(images)) % reader.world  # (N,) the rank that keeps it
        super().__init__(*args, keep=self._owner == reader.rank, **kwargs)

    def make_batches(self, parts: list[Part], epoch: int | None, preset: Preset) -> Iterator[Batch]:
        """Yield the batches of `parts`; see `Backend`."""
        batches = super().make_batches(parts, epoch, preset)  # checks the preset; draws nothing yet
        if epoch is None:
            return BetonLoader.make_batches(self, parts, None, preset)
        return batches if self.world == 1 else self._exchange_batches(parts, epoch, preset)

    def _exchange_batches(self, parts: list[Part], epoch: int, preset: Preset) -> Iterator[Batch]:
        """The batches of this rank, whose rows are made by the ranks that keep the images."""
        requests = gather_objects([(part.samples, part.turn) for part in parts], self.world)
        assert len({len(request) for request in requests}) == 1, "the ranks draw different batches"

        def make(samples: NDArray[np.int64], turn: NDArray[np.int64]) -> Tensor:
            u = augment.draws(self.seed, epoch, turn, samples, preset)
            return self._build_rows(samples, u, preset).permute(0, 2, 3, 1)

        for k, part in enumerate(parts):
            wanted = [request[k] for request in requests]
            rows = answer_requests(wanted, self._owner, self.rank, make)
            yield self._finish(rows.permute(0, 3, 1, 2), part)


def _shift(pixels: Tensor, offsets: Tensor, pad: int, reflect: bool) -> Tensor:
    """(B, S, S, 3): the crop at `offsets` (B, 2) of each image padded with zeros or its mirror."""
    size = pixels.shape[1]
    steps = torch.arange(size, device=pixels.device)[None]
    rows, columns = (offsets[:, k : k + 1] - pad + steps for k in (0, 1))  # (B, S)
    if reflect:
        rows, columns = (size - 1 - (size - 1 - at.abs()).abs() for at in (rows, columns))
    inside = [(where >= 0) & (where < size) for where in (rows, columns)]
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    found = pixels[
        image, rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]
    ]
    return found * (inside[0][:, :, None] & inside[1][:, None, :])[..., None]


def _size(one: EncodedImage | UnreadableImage) -> tuple[int, int]:
    if isinstance(one, UnreadableImage):
        raise one
    return one.height, one.width
