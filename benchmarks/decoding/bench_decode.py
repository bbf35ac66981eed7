"""Decoding a JPEG in memory to RGB on one thread: our decoder and the libraries at hand.

    cd benchmarks && python -m decoding.bench_decode --images PHOTOS --out results/decode_cpu.csv

The protocol is that of imread_benchmark (Iglovikov and Kosarevsky 2026, "Single-Thread JPEG Decoder
Benchmarks Mis-Evaluate ML Data Loaders", arXiv 2605.08731): bytes lie in memory, every image is
decoded once and looked at, a pass warms up, and timed passes follow without Python's collector.
Every decoder delivers uint8 RGB, as it comes, in memory of its own. Here the decoders take turns,
pass by pass, and time is of the processor, which neighbors move less than the clock. "difference"
is the largest of any pixel from Pillow's.

"crop" is what a training image needs of a file: the part under the box of a random resized crop,
the same boxes for all. A library that knows whole images alone decodes the whole and cuts.

The published runs take ImageNet's 50,000 validation images as they are. These are the photographs
that are given, as they are, and again 500 pixels long (`--longer`), as ImageNet's mostly are; a row
of megapixels a second makes sizes comparable.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from harness import Results, row
from numpy.typing import NDArray
from PIL import Image

from letheon.loaders.decode.jpeg import Box, available, crop, pixels
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment

Pixels = NDArray[np.uint8]
Whole = Callable[[Pixels], Pixels]  # encoded bytes to (H, W, 3)
Part = Callable[[Pixels, Box], Pixels]


@dataclass(frozen=True)
class Options:
    """Which photographs, and how often."""

    images: Path
    """a folder of JPEGs"""
    out: Path | None = None
    """CSV file to write; printed only, if not given"""
    count: int = 400
    """photographs to use"""
    repeats: int = 7
    """timed passes of each decoder"""
    longer: int = 500
    """pixels of the longer side of the second set; 0 leaves it out"""


def decoders() -> Iterator[tuple[str, Whole]]:
    """Our decoder with each library it knows, and each library as its own documentation uses it."""
    for codec in available():
        yield f"letheon, {codec}", lambda data, codec=codec: pixels(data, "", codec=codec)  # type: ignore[misc]
    yield "pillow", lambda data: np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        yield "simplejpeg", lambda data: simplejpeg.decode_jpeg(data, "RGB")
    if importlib.util.find_spec("turbojpeg"):
        import turbojpeg

        yield "turbojpeg", lambda data: np.asarray(turbojpeg.decompress(data, turbojpeg.PF.RGB))
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        yield "opencv", lambda data: cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
    yield from _tensor_decoders()


def _tensor_decoders() -> Iterator[tuple[str, Whole]]:
    """Libraries that make tensors of 3 x H x W; they are handed over without a copy."""

    def as_array(decode: Callable[[torch.Tensor], torch.Tensor]) -> Whole:
        return lambda data: decode(torch.from_numpy(data)).permute(1, 2, 0).numpy()

    from torchvision.io import ImageReadMode, decode_jpeg

    yield "torchvision", as_array(lambda data: decode_jpeg(data, ImageReadMode.RGB))
    if importlib.util.find_spec("torchcodec"):
        from torchcodec.decoders import decode_jpeg as decode

        yield "torchcodec", as_array(lambda data: decode(data, mode="RGB"))


def croppers(whole: dict[str, Whole]) -> Iterator[tuple[str, Part]]:
    """How each comes to a part of an image."""

    def cut(decode: Whole) -> Part:
        def part(data: Pixels, box: Box) -> Pixels:
            top, left, height, width = box
            return decode(data)[top : top + height, left : left + width]

        return part

    for name, decode in whole.items():
        if name.startswith("letheon"):
            codec: Any = name.split()[-1]
            yield name, lambda data, box, codec=codec: crop(data, "", box, codec=codec)  # type: ignore[misc]
        else:
            yield name, cut(decode)


def read(options: Options, longer: int) -> list[Pixels]:
    """The bytes of the photographs; with `longer` scaled to that many pixels, at quality 90."""
    paths = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    chosen = [paths[k * len(paths) // options.count] for k in range(options.count)]
    if not longer:
        return [np.frombuffer(path.read_bytes(), np.uint8).copy() for path in chosen]
    found = []
    for path in chosen:
        with Image.open(path) as image:
            scale = longer / max(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            file = io.BytesIO()
            scaled = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            scaled.save(file, "JPEG", quality=90)
        found.append(np.frombuffer(file.getvalue(), np.uint8).copy())
    return found


def time_passes(passes: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of the processor of each pass, the passes taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for run in passes.values():
        run()
    for _ in range(repeats):
        for name, run in passes.items():
            gc.collect()
            gc.disable()
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
            gc.enable()
    return seconds


def measure(files: Sequence[Pixels], x: str, repeats: int, results: Results) -> None:
    """Rows of whole images and of crops."""
    whole = dict(decoders())
    truth = [whole["pillow"](data) for data in files]
    shapes = np.array([image.shape[:2] for image in truth])
    turn, samples = np.zeros(len(files), np.int64), np.arange(len(files))
    u = augment.draws(0, 0, turn, samples, Preset(224))
    boxes: list[Any] = [tuple(map(int, box)) for box in augment.boxes(u, shapes)]
    megapixels = float(shapes.prod(1).sum()) / 1e6
    parts = dict(croppers(whole))
    for name, decode in whole.items():
        pairs = zip(files, truth, strict=True)
        gap = max(int(np.abs(decode(d).astype(int) - t.astype(int)).max()) for d, t in pairs)
        results.add([row("decode", name, [gap], metric="difference", unit="/255", x=x,
                         device="cpu")])  # fmt: skip

    def pass_over(decode: Whole) -> Callable[[], None]:
        def run() -> None:
            for data in files:
                decode(data)

        return run

    def pass_of_parts(part: Part) -> Callable[[], None]:
        def run() -> None:
            for data, box in zip(files, boxes, strict=True):
                part(data, box)

        return run

    for metric, passes in (
        ("decode", {name: pass_over(decode) for name, decode in whole.items()}),
        ("crop", {name: pass_of_parts(part) for name, part in parts.items()}),
    ):
        for name, seconds in time_passes(passes, repeats).items():
            rates = [len(files) / s for s in seconds]
            results.add([row(metric, name, rates, metric="rate, processor", unit="images/s", x=x,
                             device="cpu")])  # fmt: skip
            if metric == "decode":
                rates = [megapixels / s for s in seconds]
                results.add([row(metric, name, rates, metric="pixels, processor", unit="MP/s", x=x,
                                 device="cpu")])  # fmt: skip


def main(options: Options) -> None:
    """Measure the photographs as they are, and longer."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    results = Results(options.out)
    for longer in dict.fromkeys((0, options.longer)):
        files = read(options, longer)
        size = f"{longer} px long, quality 90" if longer else "as they are"
        size += f", {np.mean([len(f) for f in files]) / 1024:.0f} KiB"
        measure(files, f"{options.images.name}, {size}", options.repeats, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
