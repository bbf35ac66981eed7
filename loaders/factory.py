"""Which backend delivers the batches: the one that was asked for, or the one that suits the set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.choices import refuse_choice
from letheon.errors import InputError
from letheon.loaders.backends.base import Backend
from letheon.loaders.backends.dali_loader import DaliLoader
from letheon.loaders.backends.ffcv_loader import FfcvLoader
from letheon.loaders.backends.memory import free_bytes
from letheon.loaders.backends.resident_loader import ResidentLoader, ShardedLoader
from letheon.loaders.backends.tensor_loader import TensorLoader
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Loader, Reader
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ArrayImages, ImageSet
from letheon.loaders.datasets.map_style import MapStyleImages
from letheon.loaders.decode import jpeg
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.preset import Preset
from letheon.loaders.views import unwrap

Kind = Literal["auto", "torch", "beton", "ffcv", "dali", "resident", "tensor"]
RESIDENT_SHARE = 0.25  # of the free device memory that `auto` gives to images


@dataclass(frozen=True)
class CacheOptions:
    """What the backends that keep decoded images keep."""

    resident_shard: bool = False
    """resident: each rank keeps its share of the images, and they give each other the rows of a
    batch; sweeps read the originals on the host."""
    resident_forget: bool = False
    """resident: keep the forget set alone, of a set that does not fit; the other images are decoded
    as they are needed."""
    dali_cache: float = 0.0
    """dali: GiB of decoded images to keep on the device, or on the host where there is no GPU."""

    def check(self, kind: Kind) -> None:
        """Raises `InputError` for an option of another backend than `kind`."""
        if self.resident_shard and kind not in ("auto", "resident"):
            raise InputError(
                f"got resident shard with the loader {kind}, expected the loader resident; use it",
                option="resident_shard",
            )
        if self.resident_forget and (kind != "resident" or self.resident_shard):
            raise InputError(
                f"got resident forget with the loader {kind}"
                f"{' and resident shard' * self.resident_shard}, expected the loader resident "
                "alone; use that",
                option="resident_forget",
            )
        if self.dali_cache < 0 or (self.dali_cache and kind != "dali"):
            raise InputError(
                f"got a dali cache of {self.dali_cache} with the loader {kind}, expected the "
                "loader dali and a size in GiB; give these, or leave it out",
                option="dali_cache",
            )


def make_loader(
    kind: Kind,
    images: ImageSet,
    forget: NDArray[np.bool_],
    preset: Preset,
    batch_size: int,
    reader: Reader,
    caches: CacheOptions | None = None,
    tell: Callable[[str], object] = lambda text: None,
) -> Loader:
    """A `Loader` over `images`; `tell` is given one line about the choice of `auto`.

    All kinds deliver the same samples in the same order with the same boxes and mirrors; pixels
    differ by the resize filter, see `docs/loaders.md`. `torch` delivers to the host, the others to
    `device`.

    Raises:
        InputError: The kind is unknown, not installed, or does not suit the images or the preset.
    """
    if kind not in get_args(Kind):
        raise refuse_choice(kind, get_args(Kind), "loader")
    if reader.block < 0:
        raise InputError(
            f"got a block of {reader.block}, expected a number of images, or 0 for none; give one",
            option="block",
        )
    caches = caches or CacheOptions()
    caches.check(kind)
    if kind == "auto":
        kind, reason = choose_backend(images, preset, torch.device(reader.device))
        tell(f"loader auto takes {kind}: {reason}")
    source, _ = unwrap(images)
    if isinstance(source, MapStyleImages) and source.tensors and kind != "tensor":
        raise InputError(
            f"{images.name}: got the loader {kind} for a dataset that gives float tensors, "
            "expected tensor; use that or auto",
            option="loader",
        )
    args = (images, forget, preset, batch_size, reader)
    if kind == "dali":
        return DaliLoader(*args, cache=int(caches.dali_cache * 2**30), tell=tell)
    if kind == "resident" and caches.resident_shard:
        return ShardedLoader(*args, tell=tell)
    if kind == "resident":
        return ResidentLoader(*args, keep=forget if caches.resident_forget else None, tell=tell)
    return _PLAIN[kind](*args)


_PLAIN: dict[Kind, type[Backend]] = {
    "torch": TorchLoader,
    "tensor": TensorLoader,
    "beton": BetonLoader,
    "ffcv": FfcvLoader,
}
_KINDS: dict[type, Kind] = {
    **{backend: kind for kind, backend in _PLAIN.items()},
    DaliLoader: "dali",
    ShardedLoader: "resident",
    ResidentLoader: "resident",
}


def kind_of(loader: Loader) -> str:
    """The kind that a loader of ours is of; of another its class's name."""
    return _KINDS.get(type(loader), type(loader).__name__)


def choose_backend(images: ImageSet, preset: Preset, device: torch.device) -> tuple[Kind, str]:
    """The backend for these images on this device, and why.

    ffcv and DALI are never taken unasked: `beton` has measured faster than ffcv at the same boxes
    (`benchmarks/results/loaders_cpu.csv`), and DALI on a GPU has not been measured.
    """
    images, _ = unwrap(images)
    if isinstance(images, MapStyleImages) and images.tensors:
        return "tensor", "tensors that the dataset has transformed by itself"
    if device.type == "cuda":
        needed, free = _bytes(images, preset), free_bytes(device)
        if needed is not None and needed <= RESIDENT_SHARE * free:
            share = f"{needed / 2**30:.2f} GiB of {free / 2**30:.1f} GiB free"
            return "resident", f"the images fit on {device} ({share})"
    if isinstance(images, BetonImages | FileImages):
        codec = jpeg.available()[0]
        part = "the crop alone" if codec == "turbo" else "whole images"
        return "beton", f"encoded images, decoded by threads with {codec} ({part})"
    return "torch", "decoded images in memory"


def _bytes(images: ImageSet, preset: Preset) -> int | None:
    """What `ResidentLoader` would keep; None where the sizes are not known without reading."""
    if preset.augment != "resized-crop-flip":
        return len(images) * preset.size**2 * 3
    if preset.resize not in ("short", "crop-square"):
        return None
    if isinstance(images, BetonImages):
        height, width = (int(images.table[side].max(initial=1)) for side in ("height", "width"))
        return len(images) * height * width * 3
    return images.pixels.nbytes if isinstance(images, ArrayImages) else None
