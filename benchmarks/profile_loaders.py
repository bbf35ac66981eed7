"""Where the time of an image goes in `--loader beton`: milliseconds of one core for each step.

    python benchmarks/profile_loaders.py --images PHOTOGRAPHS --out results/loaders_cpu.csv

The photographs and crops of `bench_loaders.py`, kept as JPEGs and as raw pixels. "entropy" is the
crop decoded at an eighth of the scale: the bits of every row down to the crop's end are read, and
next to nothing is done with them; it is the part of "decode" that no crop avoids. "everything" is
what the loader calls, the steps and what lies between them. Steps take turns; rows are appended.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_loaders import photographs
from harness import Row, row, show, write
from numpy.typing import NDArray

from letheon.loaders.backends.threaded_loader import ROWS
from letheon.loaders.decode.jpeg import available
from letheon.loaders.decode.turbojpeg import Turbo
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment, decode_rows, geometry

Step = Callable[[int], object]  # does it to image k


def steps(images: BetonImages, size: int) -> dict[str, Step]:
    """Each step of an image by name, on inputs that were made before."""
    preset, everyone = Preset(size=size), np.arange(len(images))
    stored = images.read_encoded(everyone)
    u = augment.draws(0, 0, np.zeros_like(everyone), everyone, preset)
    boxes = augment.boxes(u, np.array([(one.height, one.width) for one in stored])).tolist()
    crops = [one.crop(box) for one, box in zip(stored, boxes, strict=True)]
    squares: list[NDArray[np.uint8]] = [
        np.ascontiguousarray(geometry.resize(crop, size, size, preset)) for crop in crops
    ]
    out = torch.empty((ROWS, size, size, 3))

    def everything(k: int) -> None:
        if k % ROWS == 0:
            decode_rows.fill(
                out[: len(stored[k : k + ROWS])], stored[k : k + ROWS], u[k : k + ROWS], preset
            )

    found: dict[str, Step] = {}
    if not stored[0].raw and available()[0] == "turbo":
        turbo = Turbo()
        found["entropy"] = lambda k: turbo.decode(stored[k].data, None, tuple(boxes[k]), 3)
    return found | {
        "copy" if stored[0].raw else "decode": lambda k: stored[k].crop(boxes[k]),
        "resize": lambda k: geometry.resize(crops[k], size, size, preset),
        "normalise": lambda k: decode_rows.write(
            out[k % ROWS], torch.from_numpy(squares[k]), preset
        ),
        "everything": everything,
    }


def measured(found: dict[str, Step], count: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of processor time per image, the steps taking turns."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(repeats + 1):  # the first is not counted
        for name, step in found.items():
            start = time.process_time()
            for k in range(count):
                step(k)
            if turn:
                times[name].append(1e3 * (time.process_time() - start) / count)
    return times


def main() -> None:
    """Measure, print and append to the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--out", type=Path, default=None, help="CSV to append to")
    parser.add_argument("--count", type=int, default=192, help="photographs to use")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 160])
    told = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    table: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        files = photographs(told.images, Path(scratch) / "photographs", told.count)
        for kept, raw in (("jpeg", 0.0), ("raw", 1.0)):
            beton = Path(scratch) / f"{kept}.beton"
            write_beton(files, beton, Encoding(raw=raw), progress=False)
            images = BetonImages(beton)
            for size in told.sizes:
                times = measured(steps(images, size), len(images), told.repeats)
                mode = available()[0] if kept == "jpeg" else "float32"
                table += [
                    row(f"profile, {kept}", name, values, mode=mode, x=size, device="cpu")
                    for name, values in times.items()
                ]
    show(table)
    if told.out is not None:
        write(table, told.out, append=True)


if __name__ == "__main__":
    main()
