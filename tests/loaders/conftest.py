"""Small generated image folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_source

Drawn = Callable[..., Path]


@pytest.fixture
def draw(tmp_path: Path) -> Drawn:
    """A function that writes noise images at the given paths below a root and returns the root."""

    def write(paths: list[str], root: str = "set", size: tuple[int, int] = (12, 10)) -> Path:
        for number, path in enumerate(paths):
            file = tmp_path / root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file, format="PNG")
        return tmp_path / root

    return write


@pytest.fixture
def array_images() -> Callable[[int], ArrayImages]:
    """A function that makes n images of 16 x 16, each of one colour that encodes its number."""

    def make(n: int) -> ArrayImages:
        pixels = np.zeros((n, 16, 16, 3), dtype=np.uint8)
        pixels[..., 0] = (np.arange(n) % 251)[:, None, None]
        pixels[..., 1] = np.arange(16)[:, None]
        pixels[..., 2] = np.arange(16)
        return ArrayImages("numbered", pixels, np.arange(n) % 4, list("abcd"))

    return make


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 34 smooth JPEGs of several sizes in two classes, with file names of all kinds."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(34):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        size = (int(rng.integers(70, 140)), int(rng.integers(60, 120)))
        file = (
            root / "ab"[number % 2] / ["{:02}.jpg", "ü {:02}.JPEG"][number % 3 == 0].format(number)
        )
        file.parent.mkdir(exist_ok=True)
        coarse.resize(size, Image.Resampling.BICUBIC).save(
            file, "JPEG", quality=90, subsampling=number % 3
        )
    return root


@pytest.fixture(scope="session")
def images(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> BetonImages:
    """The photographs as a beton file, two in five of them as pixels."""
    out = tmp_path_factory.mktemp("beton") / "set.beton"
    found = open_source(str(photographs))
    assert isinstance(found, dict)
    write_beton(next(iter(found.values())), out, Encoding(raw=0.4))
    return BetonImages(out)
