"""Which backend delivers the batches: the one that was asked for, or the one that suits the set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.loaders.backends.base import Backend, unwrapped
from letheon.loaders.backends.dali_loader import DaliLoader
from letheon.loaders.backends.ffcv_loader import FfcvLoader
from letheon.loaders.backends.resident_loader import ResidentLoader, free_bytes
from letheon.loaders.backends.tensor_loader import TensorLoader
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Loader
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ArrayImages, ImageSet
from letheon.loaders.datasets.map_style import MapStyleImages
from letheon.loaders.decode import jpeg
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.preset import Preset

Kind = Literal["auto", "torch", "beton", "ffcv", "dali", "resident", "tensor"]
RESIDENT_SHARE = 0.25  # of the free device memory that `auto` gives to images


@dataclass(frozen=True)
class Keeping:
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
            raise InputError(f"got --resident-shard with --loader {kind}; use --loader resident")
        if self.resident_forget and (kind != "resident" or self.resident_shard):
            raise InputError(
                f"got --resident-forget with --loader {kind}"
                f"{' and --resident-shard' * self.resident_shard}; use --loader resident alone"
            )
        if self.dali_cache < 0 or (self.dali_cache and kind != "dali"):
            raise InputError(
                f"got --dali-cache {self.dali_cache} with --loader {kind}; give --loader dali and "
                "a size in GiB, or leave it out"
            )


def make_loader(
    kind: Kind,
    images: ImageSet,
    forget: NDArray[np.bool_],
    preset: Preset,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    tell: Callable[[str], object] = lambda text: None,
    keeping: Keeping | None = None,
    block: int = 0,
) -> Loader:
    """A `Loader` over `images`; `tell` is given one line about the choice of `auto`.

    All kinds deliver the same samples in the same order with the same boxes and mirrors; pixels
    differ by the resize filter, see `docs/loaders.md`. `torch` delivers to the host, the others to
    `device`. `block` is that of `order.epoch_parts`.

    Raises:
        InputError: The kind is unknown, not installed, or does not suit the images or the preset.
    """
    if kind not in get_args(Kind):
        raise InputError(f"got --loader {kind}, expected one of {', '.join(get_args(Kind))}")
    if block < 0:
        raise InputError(f"got --block {block}, expected a number of images, or 0 for none")
    keeping = keeping or Keeping()
    keeping.check(kind)
    device = torch.device(device)
    if kind == "auto":
        kind, reason = suited(images, preset, device)
        tell(f"--loader auto takes {kind}: {reason}")
    source, _ = unwrapped(images)
    if isinstance(source, MapStyleImages) and source.tensors and kind != "tensor":
        raise InputError(
            f"{images.name}: got the loader {kind} for a dataset that gives float tensors, "
            "expected tensor; use that or auto",
            option="loader",
        )
    told = (images, forget, preset, batch_size, seed, rank, world, workers, device)
    made: Backend
    if kind == "torch":
        made = TorchLoader(*told[:-1])
    elif kind == "tensor":
        made = TensorLoader(*told[:-1])
    elif kind == "beton":
        made = BetonLoader(*told)
    elif kind == "ffcv":
        made = FfcvLoader(*told)
    elif kind == "dali":
        made = DaliLoader(*told, cache=int(keeping.dali_cache * 2**30), tell=tell)
    else:
        keep = forget if keeping.resident_forget else None
        made = ResidentLoader(*told, keep=keep, shard=keeping.resident_shard, tell=tell)
    made.block = block
    return made


def suited(images: ImageSet, preset: Preset, device: torch.device) -> tuple[Kind, str]:
    """The backend for these images on this device, and why.

    ffcv and DALI are never taken unasked: `beton` has measured faster than ffcv at the same boxes
    (`benchmarks/results/loaders_cpu.csv`), and DALI on a GPU has not been measured.
    """
    images, _ = unwrapped(images)
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
