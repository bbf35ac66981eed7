"""NVIDIA DALI: JPEGs decoded on the GPU, by its hardware decoder where there is one.

DALI is given the bytes, the boxes and the mirrors, so order and augmentation are those of every
backend. Resized by an antialiased triangle filter; the test transform takes a box with fractional
borders. Without a GPU the same pipeline runs on the CPU, which is how it is tested; on a GPU it has
not been measured. Raw images of a `.beton` and formats other than JPEG are made by `rows`.

DALI's own cache of decoded images goes by the file names of its own reader and knows no crops, so
it is of no use here; `cache` keeps decoded images where the pipeline wants them instead.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import InputError, UnreadableImage, install_extra
from letheon.loaders.backends.base import prefetch
from letheon.loaders.backends.memory import free_bytes, to_device
from letheon.loaders.backends.resident_loader import SHARE
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.batch import Batch
from letheon.loaders.decode.encoded_image import EncodedImage
from letheon.loaders.order import Part
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment, crop_boxes
from letheon.loaders.transforms.decode_rows import fill
from letheon.loaders.transforms.normalize import normalize_on

Source = Literal["jpeg", "image", "decode"]


def is_installed() -> bool:
    """Whether DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of NVIDIA's at all
        return False


class DaliLoader(BetonLoader):
    """`Loader` over any `ImageSet`, made for those of encoded images; `workers` threads on the CPU.

    The size is an input of the pipelines, which serve a growing resolution. Images are float32.

    Attributes:
        cache: bytes of decoded images that stay on the device (or the host, where there is no GPU),
            the first that come until it is full; they are not decoded again.
    """

    def __init__(
        self,
        *args: Any,
        cache: int = 0,
        tell: Callable[[str], object] = lambda text: None,
        **kwargs: Any,
    ) -> None:
        """As `BetonLoader`; `tell` is given one line about the cache before it is taken.

        Raises:
            InputError: DALI is not installed, the cache does not fit, or the preset needs more
                than a box of each image.
        """
        super().__init__(*args, **kwargs)
        if not is_installed():
            raise InputError(
                "got the loader dali, and nvidia-dali is not installed; expected it; "
                f"{install_extra('dali')}, or use the loader beton",
                option="loader",
            )
        crop_boxes.check(self.preset, "dali")
        self.cache = cache
        if cache:
            free = free_bytes(self.device)
            tell(
                f"loader dali keeps decoded images: up to {cache / 2**30:.2f} GiB of "
                f"{free / 2**30:.2f} GiB free on {self.device}"
            )
            if cache > SHARE * free:
                raise InputError(
                    f"got a cache of {cache / 2**30:.2f} GiB, expected at most "
                    f"{SHARE * free / 2**30:.2f} GiB on {self.device}; give a smaller one",
                    option="dali_cache",
                )
        self._decoded: dict[int, Any] = {}  # (H, W, 3) uint8 by sample
        self._room = cache
        self._pipelines: dict[tuple[str, bool], Any] = {}  # by input, and whether they train
        self._most = 2 * self.batch_size  # `paired` appends a forget half; one rank may hold all

    def make_batches(self, parts: list[Part], epoch: int | None, preset: Preset) -> Iterator[Batch]:
        """Yield the batches of `parts`; see `Backend`."""
        crop_boxes.check(preset, "dali")
        most = max((len(part.samples) for part in parts), default=0)
        if most > self._most:  # a pipeline is built for so many images and no more
            self._pipelines.clear()
            self._most = most
        return prefetch(lambda part: self._batch(part, epoch, preset), parts)

    def _batch(self, part: Part, epoch: int | None, preset: Preset) -> Batch:
        encoded = self.read_encoded(part.samples)
        u = None
        if epoch is not None:
            u = augment.draws(self.seed, epoch, part.turn, part.samples, preset)
        by_dali = np.array([_for_dali(one) for one in encoded], dtype=np.bool_)
        images = torch.empty(
            (len(encoded), preset.size, preset.size, 3), device=self.device
        )  # (B, S, S, 3)
        if by_dali.any():
            try:
                self._keep(part.samples, encoded, by_dali, preset)
                kept = by_dali & [i in self._decoded for i in part.samples.tolist()]
                ways: tuple[tuple[Source, NDArray[np.int64]], ...] = (
                    ("image", np.flatnonzero(kept)),
                    ("jpeg", np.flatnonzero(by_dali & ~kept)),
                )
                for source, rows in ways:
                    if len(rows):
                        images[to_device(torch.from_numpy(rows), self.device)] = self._run(
                            source, part.samples[rows], [encoded[k] for k in rows.tolist()],
                            None if u is None else u[rows], preset,
                        )  # fmt: skip
            except RuntimeError:  # an image that cannot be decoded; Pillow judges which
                self._pipelines.clear()
                by_dali[:] = False
        if not by_dali.all():
            rows = np.flatnonzero(~by_dali)
            rest = torch.empty((len(rows), preset.size, preset.size, 3), dtype=torch.uint8)
            left = [encoded[k] for k in rows.tolist()]
            fill(rest, left, None if u is None else u[rows], preset)
            made = normalize_on(rest, preset, self.device).permute(0, 2, 3, 1)
            images[to_device(torch.from_numpy(rows), self.device)] = made
        return self._finish(images.permute(0, 3, 1, 2), part)

    def _keep(
        self,
        samples: NDArray[np.int64],
        encoded: Sequence[EncodedImage | UnreadableImage],
        by_dali: NDArray[np.bool_],
        preset: Preset,
    ) -> None:
        """Decode the images of `by_dali` for which there is room, and keep them."""
        new: dict[int, EncodedImage] = {}
        room = self._room
        for i, one, wanted in zip(samples.tolist(), encoded, by_dali.tolist(), strict=True):
            if not wanted or i in self._decoded or i in new or isinstance(one, UnreadableImage):
                continue
            size = 3 * one.height * one.width
            if size <= room:
                new[i] = one
                room -= size
        if not new:
            return
        (out,) = self._pipeline("decode", False, preset).run(jpeg=[s.data for s in new.values()])
        for k, i in enumerate(new):
            self._decoded[i] = _copy(out[k], self.device)
        self._room = room

    def _pipeline(self, source: Source, training: bool, preset: Preset) -> Any:
        key = (source, training)
        if key not in self._pipelines:
            self._pipelines[key] = _build_pipeline(source, training, self._most, self, preset)
        return self._pipelines[key]

    def _run(
        self,
        source: Source,
        samples: NDArray[np.int64],
        encoded: Sequence[EncodedImage | UnreadableImage],
        u: NDArray[np.float64] | None,
        preset: Preset,
    ) -> Tensor:
        """(B, S, S, 3) float32, normalised; a copy, since DALI uses its own memory again."""
        training = u is not None
        jpegs = [one for one in encoded if isinstance(one, EncodedImage)]
        shapes = np.array([(one.height, one.width) for one in jpegs], dtype=np.int64)
        cut = augment.boxes(u, shapes) if u is not None else crop_boxes.central(shapes, preset)
        mirror = np.zeros(len(jpegs)) if u is None else augment.mirror_mask(u, preset)
        kind = np.int32 if training else np.float32
        inputs: list[Any] = [one.data for one in jpegs]
        if source == "image":
            inputs = [self._decoded[i] for i in samples.tolist()]
        outputs = self._pipeline(source, training, preset).run(
            **{source: inputs},
            start=list(cut[:, :2].astype(kind)),
            extent=list((cut[:, 2:] if training else cut[:, :2] + cut[:, 2:]).astype(kind)),
            size=[np.full(2, preset.size, np.float32)] * len(jpegs),
            mirror=list(mirror.astype(np.int32)),
        )
        batch = _copy(outputs[0].as_tensor(), self.device)
        return torch.from_numpy(batch) if self.device.type == "cpu" else batch


def _copy(tensor: Any, device: torch.device) -> Any:
    """An array on the host, or a tensor on the GPU, of what DALI will overwrite."""
    if device.type == "cpu":
        return np.array(tensor)
    return torch.utils.dlpack.from_dlpack(tensor).clone()


def _for_dali(one: EncodedImage | UnreadableImage) -> bool:
    """Whole JPEGs only: DALI ends the process on some that are not."""
    if isinstance(one, UnreadableImage) or one.raw:
        return False
    return bytes(one.data[:2]) == b"\xff\xd8" and bytes(one.data[-2:]) == b"\xff\xd9"


def _build_pipeline(
    source: Source, training: bool, batch_size: int, loader: DaliLoader, preset: Preset
) -> Any:
    """From JPEGs or decoded images to normalised squares, or from JPEGs to decoded images."""
    dali = importlib.import_module("nvidia.dali")
    fn, types = importlib.import_module("nvidia.dali.fn"), dali.types
    on_gpu = loader.device.type == "cuda"
    # No loader applies the orientation tag, which DALI does unless it is told not to.
    decoding = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
    }

    def graph() -> Any:
        if source == "image":
            decoded = fn.external_source(
                name="image", dtype=types.UINT8, ndim=3, layout="HWC",
                device="gpu" if on_gpu else "cpu",
            )  # fmt: skip
        else:
            jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1)
        if source == "decode":
            return fn.decoders.image(jpeg, **decoding)
        number = types.INT32 if training else types.FLOAT
        start = fn.external_source(name="start", dtype=number, ndim=1)
        extent = fn.external_source(name="extent", dtype=number, ndim=1)
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        linear = {"size": size, "interp_type": types.INTERP_LINEAR, "antialias": True}
        cut = {"start": start, "shape": extent, "axes": [0, 1]}
        if source == "jpeg" and training:
            images = fn.decoders.image_slice(jpeg, **decoding, **cut)
        elif source == "jpeg":
            images = fn.decoders.image(jpeg, **decoding)
        else:
            images = fn.slice(decoded, **cut) if training else decoded
        if not training:
            linear |= {"roi_start": start, "roi_end": extent}
        images = fn.resize(images, **linear)
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
        batch_size=batch_size,
        num_threads=max(1, loader.workers),
        device_id=device_id,
        prefetch_queue_depth=1,
    )
    pipeline.build()
    return pipeline
