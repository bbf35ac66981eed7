"""The data that needs no download: scikit-learn's handwritten digits, and four redrawings of them.

The digits are real: 1,797 scans of 8 x 8 pixels (Alpaydin and Kaynak 1998, the test part of the UCI
"Optical Recognition of Handwritten Digits"). Here they are RGB, enlarged to 16 x 16.

The downstream set is a stand-in. It has the layout of Office-Home (domains x classes), so
that transfer is measured by the same code, but it is only the same digits redrawn by rule in four
styles: results on it say nothing about Office-Home.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.kernels import keyed
from letheon.loaders.datasets.image_set import ArrayImages

CLASSES = tuple(str(digit) for digit in range(10))
DOMAINS = ("ink", "negative", "outline", "textured")
TEST_SHARE = 0.2


@cache
def _scans() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(1797, 16, 16) strokes in 0..255, bright on dark, and (1797,) labels."""
    table = _read_table()
    x = table[:, :-1].reshape(-1, 8, 8)  # (1797, 8, 8), 0..16
    for axis in (1, 2):
        x = _double(x, axis)  # bilinear in whole numbers, each pass times 4
    return (x * 255 + 128) // 256, table[:, -1]


def _read_table() -> NDArray[np.int64]:
    """(1797, 65): the pixels of a scan, and its label.

    From scikit-learn's file, whose reader takes a second or two to import; by that reader where the
    file lies elsewhere.
    """
    package = find_spec("sklearn")  # which imports nothing
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.int64)
    from sklearn.datasets import load_digits

    raw = load_digits()
    return np.column_stack([raw.data, raw.target]).astype(np.int64)


def _double(x: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Twice as long along `axis`, bilinear with repeated edges, times 4 so that it stays whole."""
    x = np.moveaxis(x, axis, -1)
    edge = np.concatenate([x[..., :1], x, x[..., -1:]], axis=-1)
    left, right = 3 * x + edge[..., :-2], 3 * x + edge[..., 2:]
    both = np.stack([left, right], axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])
    return np.moveaxis(both, -1, axis)


def upstream() -> tuple[ArrayImages, ArrayImages]:
    """Train and test: a fixed split, 80 % and 20 % of every class; bright strokes on black."""
    strokes, labels = _scans()
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        order = keyed.permutation(0, "digits-split", digit, len(members)).numpy()
        held_out[members[order[: round(TEST_SHARE * len(members))]]] = True
    pixels = np.repeat(strokes[..., None], 3, axis=3).astype(np.uint8)
    train, test = (
        ArrayImages(f"digits/{name}", pixels[part], labels[part], CLASSES)
        for name, part in (("train", ~held_out), ("test", held_out))
    )
    return train, test


def downstream() -> dict[str, ArrayImages]:
    """All 1,797 digits redrawn in each of four domains: the stand-in for Office-Home's layout.

    ``ink``: thick blue-black strokes on cream paper. ``negative``: black on white. ``outline``: the
    edges alone, yellow on dark blue. ``textured``: striped strokes on coloured noise (keyed by the
    digit's number, so the same on every machine).
    """
    strokes, labels = _scans()
    drawings = (
        _mix(_spread(strokes), (250, 240, 215), (20, 25, 80)),
        _mix(strokes, (255, 255, 255), (0, 0, 0)),
        _mix(_spread(strokes) - strokes, (10, 20, 60), (255, 230, 60)),
        _texture(strokes),
    )
    return {
        domain: ArrayImages(f"digits/{domain}", drawing, labels, CLASSES)
        for domain, drawing in zip(DOMAINS, drawings, strict=True)
    }


def vary() -> dict[str, ArrayImages]:
    """All 1,797 digits as they were scanned, each image disturbed in its own way, in four domains.

    ``shifted``: moved by up to 3 pixels along each axis. ``shaded``: strokes at 70 %, with light
    that grows from one side to the other. ``covered``: a grey square of 5 pixels somewhere.
    ``both``: shifted, then covered. What an image gets is keyed by the digit's number. Neighbors in
    pixels, and so in the features of an untrained network, are disturbed alike rather than digits
    alike: a trained network is clearly better here, which is not so of `downstream`.
    """
    strokes, labels = _scans()
    shifted = _shift(strokes)
    drawings = {
        "shifted": shifted,
        "shaded": _shade(strokes),
        "covered": _cover(strokes),
        "both": _cover(shifted),
    }
    sets = {}
    for name, drawing in drawings.items():
        pixels = np.repeat(drawing[..., None], 3, axis=3).astype(np.uint8)
        sets[name] = ArrayImages(f"digits-varied/{name}", pixels, labels, CLASSES)
    return sets


def _draws(stream: str, n: int, lowest: int, highest: int) -> NDArray[np.int64]:
    """(n, 3) whole numbers from `lowest` to `highest`, keyed by the image's number."""
    share = keyed.uniform(0, f"digits-{stream}", 0, torch.arange(n), 3).numpy()
    return lowest + (share * (highest - lowest + 1)).astype(np.int64)


def _shift(strokes: NDArray[np.int64]) -> NDArray[np.int64]:
    n, height, width = strokes.shape
    padded = np.pad(strokes, ((0, 0), (3, 3), (3, 3)))
    top, left, _ = _draws("shift", n, 0, 6).T
    return np.stack(
        [padded[i, top[i] : top[i] + height, left[i] : left[i] + width] for i in range(n)]
    )


def _shade(strokes: NDArray[np.int64]) -> NDArray[np.int64]:
    n, height, width = strokes.shape
    down, across, _ = _draws("shade", n, -100, 100).T
    rows, columns = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    light = abs(down[:, None, None] * rows + across[:, None, None] * columns) // (height - 1)
    return np.minimum(strokes * 7 // 10 + light, 255)


def _cover(strokes: NDArray[np.int64]) -> NDArray[np.int64]:
    covered = strokes.copy()
    top, left, _ = _draws("cover-place", len(strokes), 0, 10).T
    grey = _draws("cover-grey", len(strokes), 0, 255)[:, 0]
    for i in range(len(strokes)):
        covered[i, top[i] : top[i] + 5, left[i] : left[i] + 5] = grey[i]
    return covered


def _mix(
    strokes: NDArray[np.int64], paper: tuple[int, int, int], ink: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """(N, H, W, 3): from `paper` where strokes are 0 to `ink` where they are 255."""
    share = strokes[..., None]
    return ((np.array(paper) * (255 - share) + np.array(ink) * share + 127) // 255).astype(np.uint8)


def _spread(strokes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The greatest value among each pixel and its four neighbours: strokes two pixels thicker."""
    edge = np.pad(strokes, ((0, 0), (1, 1), (1, 1)))
    across = np.maximum(edge[:, 1:-1, :-2], edge[:, 1:-1, 2:])
    along = np.maximum(edge[:, :-2, 1:-1], edge[:, 2:, 1:-1])
    return np.maximum(strokes, np.maximum(across, along))


def _texture(strokes: NDArray[np.int64]) -> NDArray[np.uint8]:
    n, height, width = strokes.shape
    noise = keyed.uniform(0, "digits-texture", 0, torch.arange(n), height * width * 3).numpy()
    ground = (noise * 110).astype(np.int64).reshape(n, height, width, 3) + np.array([20, 60, 40])
    diagonal = (np.arange(height)[:, None] + np.arange(width)) % 4 < 2
    ink = np.where(diagonal[..., None], np.array([240, 120, 60]), np.array([250, 220, 190]))
    share = strokes[..., None]
    return ((ground * (255 - share) + ink * share + 127) // 255).astype(np.uint8)
