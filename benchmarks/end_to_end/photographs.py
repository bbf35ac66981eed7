"""A small folder of JPEGs to forget from: copied from a set that is at hand, or drawn."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDES = ("train", "val", "downstream/near")
SUFFIXES = (".jpg", ".jpeg")
SIZE = (300, 240)  # width, height
CLASSES = 10


def fit_counts(
    photos: Path | None, counts: tuple[int, int, int], scale: float
) -> tuple[int, int, int]:
    """Images of each class in train, val and downstream: `counts` times `scale`, or what there is.

    Where the photographs are fewer, all three shrink by one factor, so that what a setting
    compares stays in proportion; drawn images never are.
    """
    train, val, downstream = counts
    if photos is not None:
        known = [min(map(len, _find(photos / side).values())) for side in ("train", "val")]
        scale = min(scale, known[0] / train, known[1] / (val + downstream))
    sizes = [max(1, int(scale * n + 1e-9)) for n in counts]
    return sizes[0], sizes[1], sizes[2]


def _find(folder: Path) -> dict[str, list[Path]]:
    """The JPEGs of each class, by the names of their folders."""
    return {
        each.name: sorted(p for p in each.iterdir() if p.suffix.lower() in SUFFIXES)
        for each in sorted(p for p in folder.iterdir() if p.is_dir())
    }


def gather(photos: Path | None, out: Path, counts: Sequence[int]) -> str:
    """Fill `out` with train/, val/ and downstream/near/ of class folders; returns their source.

    Args:
        photos: a folder with train/<class>/ and val/<class>/ of JPEGs; None draws the images.
        out: folder to make.
        counts: images of each class in train, val and downstream; the last come from val too.
    """
    if photos is None:
        for number, (side, count) in enumerate(zip(SIDES, counts, strict=True)):
            for c in range(CLASSES):
                folder = out / side / f"class{c}"
                folder.mkdir(parents=True)
                for i in range(count):
                    picture = Image.fromarray(draw(c, 1000 * number + i))
                    picture.save(folder / f"{i:04d}.jpg", quality=90)
        return "drawn"
    for side in ("train", "val"):
        for label, files in _find(photos / side).items():
            cuts = {"train": files[: counts[0]]} if side == "train" else {
                "val": files[: counts[1]],
                "downstream/near": files[counts[1] : counts[1] + counts[2]],
            }  # fmt: skip
            for name, part in cuts.items():
                (out / name / label).mkdir(parents=True)
                for file in part:
                    shutil.copy(file, out / name / label / file.name)
    return photos.name


def draw(label: int, number: int) -> NDArray[np.uint8]:
    """(H, W, 3): a photograph's mixture of scales, and a tint and a grating that tell the class."""
    width, height = SIZE
    random = np.random.default_rng((label, number))
    picture = np.zeros((height, width, 3))
    for octave in range(6):
        cells = 3 * 2**octave
        coarse = random.normal(0, 40 / 1.6**octave, (cells, cells, 3))
        rows = np.arange(height) * cells // height
        columns = np.arange(width) * cells // width
        picture += coarse[rows][:, columns]
    angle = np.pi * label / CLASSES
    y, x = np.mgrid[:height, :width] / height
    wave = np.sin(40 * (x * np.cos(angle) + y * np.sin(angle)))
    tint = np.array([np.cos(angle), np.sin(2 * angle), np.sin(angle)]) * 25
    picture += 128 + 25 * wave[:, :, None] + tint
    return picture.clip(0, 255).astype(np.uint8)
