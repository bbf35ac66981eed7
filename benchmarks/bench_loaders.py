"""Images per second of one core: our loader backends, the published ffcv and DALI, and DataLoaders.

    python benchmarks/bench_loaders.py --images FOLDER_OF_PHOTOGRAPHS --out results/loaders_cpu.csv

The photographs are made 500 pixels long and encoded at quality 90, as ImageNet's mostly are, and
kept as a folder, a `.beton` of JPEGs and one that is half raw. Every variant delivers normalized
float32 batches with random resized crops and mirrors ("float32"), or bytes where the normalization
is left to the GPU ("uint8"). The process is bound to one core; time is that of all its threads,
without the neighbours', and the variants take turns. Needs the extras ffcv, dali and fast; what is
missing is left out.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from harness import Results, row
from PIL import Image

from letheon.loaders import order
from letheon.loaders.backends.dali_loader import DaliLoader
from letheon.loaders.backends.ffcv_loader import FfcvLoader
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment
from letheon.loaders.transforms.decode_rows import fill

BATCH = 64
CLASSES = 4
Epoch = Callable[[], int]  # runs one epoch and returns the number of images


def photographs(source: Path, folder: Path, count: int) -> ImageSet:
    """Class folders of `count` photographs with a longer side of 500 pixels at quality 90."""
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:count]
    for k, file in enumerate(files):
        with Image.open(file) as image:
            scale = 500 / max(image.size)
            size = round(image.width * scale), round(image.height * scale)
            place = folder / f"class{k % CLASSES}" / f"{k:05}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            smaller = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            smaller.save(place, quality=90)
    sets = open_source(str(folder))
    assert isinstance(sets, dict)
    return next(iter(sets.values()))


def ours(loader: TorchLoader | BetonLoader) -> Epoch:
    """One epoch after the other of the mixed stream."""
    epochs = iter(range(10**9))

    def run() -> int:
        return sum(len(batch.labels) for batch in loader.train("mixed", next(epochs)))

    return run


def ours_as_bytes(loader: BetonLoader) -> Epoch:
    """What `BetonLoader` does on the host where the device normalises."""
    epochs = iter(range(10**9))
    out = torch.empty((BATCH, loader.preset.size, loader.preset.size, 3), dtype=torch.uint8)

    def run() -> int:
        epoch = next(epochs)
        for part in order.epoch_parts("mixed", loader.forget, BATCH, 0, epoch):
            u = augment.draws(0, epoch, part.turn, part.samples, loader.preset)
            fill(out[: len(u)], loader.read_encoded(part.samples), u, loader.preset)
        return len(loader.images)

    return run


def published_ffcv(path: Path, preset: Preset, normalize: bool) -> Epoch:
    """The pipeline of ffcv-imagenet, its normalization on the host or left out."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    scale = [np.array(moment) * 255 for moment in (preset.mean, preset.std)]
    pipeline = [
        RandomResizedCropRGBImageDecoder((preset.size, preset.size)),
        RandomHorizontalFlip(),
    ]
    pipeline += [NormalizeImage(*scale, np.float32)] if normalize else []
    pipeline += [ToTensor(), ToTorchImage()]
    loader = Loader(
        str(path), BATCH, num_workers=1, os_cache=True, order=OrderOption.RANDOM, drop_last=False,
        pipelines={"image": pipeline, "label": [IntDecoder(), ToTensor()], "index": None},
    )  # fmt: skip
    return lambda: sum(len(images) for images, _ in loader)


def published_dali(folder: Path, preset: Preset, count: int) -> Epoch:
    """DALI's usual training pipeline with its own reader, on the CPU."""
    from nvidia.dali import fn, pipeline_def, types

    # Not ahead of the caller: what is made between two epochs would be nobody's time.
    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=BATCH, num_threads=1, device_id=None, exec_pipelined=False, exec_async=False
    )
    def graph() -> Any:
        jpegs, labels = fn.readers.file(file_root=str(folder), random_shuffle=True)
        images = fn.decoders.image_random_crop(jpegs, output_type=types.RGB)
        images = fn.resize(images, size=(preset.size, preset.size), antialias=True)
        images = fn.crop_mirror_normalize(
            images, mirror=fn.random.coin_flip(), dtype=types.FLOAT, output_layout="CHW",
            mean=[255 * m for m in preset.mean], std=[255 * s for s in preset.std],
        )  # fmt: skip
        return images, labels

    pipeline = graph()
    pipeline.build()

    def run() -> int:
        return sum(len(pipeline.run()[0]) for _ in range(count // BATCH))

    return run


def data_loader(folder: Path, preset: Preset, tensors: bool) -> Epoch:
    """ImageFolder and a DataLoader: Pillow with v1 transforms, or torchvision.io with v2."""
    from torchvision import transforms as v1
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    if tensors:
        steps = v2.Compose([
            v2.RandomResizedCrop(preset.size, antialias=True), v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(preset.mean, preset.std),
        ])  # fmt: skip
        images = ImageFolder(
            folder, steps, loader=lambda path: decode_image(path, ImageReadMode.RGB)
        )
    else:
        steps = v1.Compose([
            v1.RandomResizedCrop(preset.size), v1.RandomHorizontalFlip(), v1.ToTensor(),
            v1.Normalize(preset.mean, preset.std),
        ])  # fmt: skip
        images = ImageFolder(folder, steps)
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True)
    return lambda: sum(len(labels) for _, labels in loader)


def variants(
    form: str, files: ImageSet, folder: Path, beton: Path, size: int
) -> Iterator[tuple[str, str, Epoch]]:
    """(name, what is delivered, epoch) for one way of keeping the images; `jpeg` has them all."""
    preset = Preset(size=size)
    images = BetonImages(beton)
    arguments = (np.zeros(len(images), np.bool_), preset, BATCH, Reader(0))
    yield "letheon beton", "float32", ours(BetonLoader(images, *arguments))
    yield "letheon beton", "uint8", ours_as_bytes(BetonLoader(images, *arguments))
    if importlib.util.find_spec("ffcv"):
        yield "ffcv as published", "float32", published_ffcv(beton, preset, True)
        yield "ffcv as published", "uint8", published_ffcv(beton, preset, False)
        yield (
            "letheon ffcv",
            "float32",
            ours(FfcvLoader(images, *arguments[:-1], Reader(0, workers=1))),
        )
    if importlib.util.find_spec("nvidia.dali"):
        yield (
            "letheon dali, cpu",
            "float32",
            ours(DaliLoader(images, *arguments[:-1], Reader(0, workers=1))),
        )
    if form == "jpeg":
        yield "letheon beton, scaled", "float32", ours(BetonLoader(images, *arguments, scaled=True))
        for codec in ("simplejpeg", "pillow"):
            one = BetonLoader(images, *arguments, codec=codec)
            yield f"letheon beton, {codec}", "float32", ours(one)
        yield "letheon beton, folder", "float32", ours(BetonLoader(files, *arguments))
        yield "letheon torch, folder", "float32", ours(TorchLoader(files, *arguments))
        yield "torchvision DataLoader", "float32", data_loader(folder, preset, True)
        yield "Pillow DataLoader", "float32", data_loader(folder, preset, False)
        if importlib.util.find_spec("nvidia.dali"):
            yield "DALI as published, cpu", "float32", published_dali(folder, preset, len(files))


def rates(epochs: dict[tuple[str, str], Epoch], repeats: int) -> dict[tuple[str, str], list[float]]:
    """Images per second of processor time, the variants taking turns."""
    out: dict[tuple[str, str], list[float]] = {name: [] for name in epochs}
    for run in epochs.values():
        run()  # compiles, and reads the files once
    for _ in range(repeats):
        for name, run in epochs.items():
            start = time.process_time()
            count = run()
            out[name].append(count / (time.process_time() - start))
    return out


@dataclass(frozen=True)
class Options:
    """Which photographs, and how often."""

    images: Path
    """a folder of photographs"""
    out: Path | None = None
    """CSV to write; printed only, if not given"""
    count: int = 192
    """photographs to use"""
    repeats: int = 7
    sizes: tuple[int, ...] = (224, 160)
    """output pixels"""


def main(options: Options) -> None:
    """Measure, print and write each variant's rate."""
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photographs"
        files = photographs(options.images, folder, options.count)
        for form, raw in (("jpeg", 0.0), ("jpeg/raw mix", 0.5)):
            beton = Path(scratch) / f"{raw}.beton"
            write_beton(files, beton, Encoding(raw=raw))
            for size in options.sizes:
                epochs = {(n, m): run for n, m, run in variants(form, files, folder, beton, size)}
                results.add(
                    row(form, name, values, metric="rate", unit="images/s", mode=mode, x=size,
                        device="cpu")
                    for (name, mode), values in rates(epochs, options.repeats).items()
                )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
