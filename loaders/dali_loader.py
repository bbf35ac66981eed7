"""NVIDIA DALI: JPEGs decoded on the GPU, by its hardware decoder where there is one.

DALI is given the bytes, the boxes and the mirrors, so order and augmentation are those of every
backend. Resized by an antialiased triangle filter; the test transform takes a box with fractional
borders. Without a GPU the same pipeline runs on the CPU, which is how it is tested; on a GPU it has
not been measured. Raw images of a `.beton` and formats other than JPEG are made by `rows`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from torch import Tensor

from letheon.loaders import augment, boxes
from letheon.loaders.backend import normalised_on, prefetched
from letheon.loaders.batch import Batch
from letheon.loaders.beton_loader import BetonLoader
from letheon.loaders.errors import InputError
from letheon.loaders.order import Part
from letheon.loaders.preset import Preset
from letheon.loaders.rows import fill
from letheon.loaders.stored import Stored


def installed() -> bool:
    """Whether DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of NVIDIA's at all
        return False


class DaliLoader(BetonLoader):
    """`Loader` over any `ImageSet`, made for those of encoded images; `workers` threads on the CPU.

    The size is an input of the pipeline: it is built once for training and once for testing, and
    serves a growing resolution. Images are float32. Host memory for the compressed bytes of a
    batch, device memory for its decoded images.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `BetonLoader`.

        Raises:
            InputError: DALI is not installed, or the preset needs more than a box of each image.
        """
        super().__init__(*args, **kwargs)
        if not installed():
            raise InputError(
                "got --loader dali, and nvidia-dali is not installed; install the extra 'dali', "
                "or use --loader beton"
            )
        boxes.check(self.preset, "dali")
        self._pipelines: dict[bool, Any] = {}  # by whether they train

    def _batches(self, parts: list[Part], epoch: int | None) -> Iterator[Batch]:
        preset = self.preset
        boxes.check(preset, "dali")
        return prefetched(lambda part: self._batch(part, epoch, preset), parts)

    def _batch(self, part: Part, epoch: int | None, preset: Preset) -> Batch:
        stored = self._stored(part.samples)
        u = None
        if epoch is not None:
            u = augment.draws(self.seed, epoch, part.turn, part.samples, preset)
        theirs = np.array([_for_dali(one) for one in stored], dtype=np.bool_)
        images = torch.empty(
            (len(stored), preset.size, preset.size, 3), device=self.device
        )  # (B, S, S, 3)
        if theirs.any():
            rows = np.flatnonzero(theirs)
            jpegs = [one for one in stored if isinstance(one, Stored) and _for_dali(one)]
            try:
                images[torch.from_numpy(rows).to(self.device)] = self._run(
                    jpegs, None if u is None else u[rows], preset
                )
            except RuntimeError:  # an image that cannot be decoded; Pillow judges which
                self._pipelines.clear()
                theirs[:] = False
        if not theirs.all():
            rows = np.flatnonzero(~theirs)
            rest = torch.empty((len(rows), preset.size, preset.size, 3), dtype=torch.uint8)
            left = [stored[k] for k in rows.tolist()]
            fill(rest, left, None if u is None else u[rows], preset)
            made = normalised_on(rest, preset, self.device).permute(0, 2, 3, 1)
            images[torch.from_numpy(rows).to(self.device)] = made
        return self._finished(images.permute(0, 3, 1, 2), part)

    def _run(self, jpegs: list[Stored], u: NDArray[np.float64] | None, preset: Preset) -> Tensor:
        """(B, S, S, 3) float32, normalised; a copy, since DALI uses its own memory again."""
        training = u is not None
        if training not in self._pipelines:
            self._pipelines[training] = _built(training, self.batch_size, self, preset)
        shapes = np.array([(one.height, one.width) for one in jpegs], dtype=np.int64)
        cut = augment.boxes(u, shapes) if u is not None else boxes.central(shapes, preset)
        mirror = np.zeros(len(jpegs)) if u is None else augment.mirrored(u, preset)
        kind = np.int32 if training else np.float32
        outputs = self._pipelines[training].run(
            jpeg=[one.data for one in jpegs],
            start=list(cut[:, :2].astype(kind)),
            extent=list((cut[:, 2:] if training else cut[:, :2] + cut[:, 2:]).astype(kind)),
            size=[np.full(2, preset.size, np.float32)] * len(jpegs),
            mirror=list(mirror.astype(np.int32)),
        )
        batch = outputs[0].as_tensor()
        if self.device.type == "cpu":
            return torch.from_numpy(np.array(batch))
        return torch.utils.dlpack.from_dlpack(batch).clone()


def _for_dali(one: Stored | InputError) -> bool:
    """Whole JPEGs only: DALI ends the process on some that are not."""
    if isinstance(one, InputError) or one.raw:
        return False
    return bytes(one.data[:2]) == b"\xff\xd8" and bytes(one.data[-2:]) == b"\xff\xd9"


def _built(training: bool, batch_size: int, loader: DaliLoader, preset: Preset) -> Any:
    dali = importlib.import_module("nvidia.dali")
    fn, types = importlib.import_module("nvidia.dali.fn"), dali.types
    on_gpu = loader.device.type == "cuda"
    decoder = "mixed" if on_gpu else "cpu"

    def graph() -> Any:
        number = types.INT32 if training else types.FLOAT
        jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=number, ndim=1)
        extent = fn.external_source(name="extent", dtype=number, ndim=1)
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        linear = {"size": size, "interp_type": types.INTERP_LINEAR, "antialias": True}
        if training:
            images = fn.decoders.image_slice(
                jpeg, start=start, shape=extent, axes=[0, 1], device=decoder, output_type=types.RGB
            )
            images = fn.resize(images, **linear)
        else:
            images = fn.decoders.image(jpeg, device=decoder, output_type=types.RGB)
            images = fn.resize(images, roi_start=start, roi_end=extent, **linear)
        return fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=[255 * value for value in preset.mean],
            std=[255 * value for value in preset.std],
            dtype=types.FLOAT,
            output_layout="HWC",
        )

    device_id = (loader.device.index or 0) if on_gpu else None
    pipeline = dali.pipeline_def(graph)(
        # `paired` appends a forget half; one rank at most holds it all.
        batch_size=2 * batch_size,
        num_threads=max(1, loader.workers),
        device_id=device_id,
        prefetch_queue_depth=1,
    )
    pipeline.build()
    return pipeline
