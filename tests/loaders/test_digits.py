"""The embedded data: real, fixed, and laid out as said."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
from sklearn.datasets import load_digits

from letheon.loaders.datasets import digits


def test_split_is_stratified_complete_and_fixed() -> None:
    train, test = digits.upstream()
    assert len(train) + len(test) == 1797 and train.classes == test.classes == tuple("0123456789")
    whole = np.bincount(load_digits().target)
    assert np.bincount(test.labels).tolist() == [round(0.2 * count) for count in whole]
    # a change of the digits, their drawing or the split changes every published number
    assert train.digest.startswith("f48aa0802f87") and test.digest.startswith("408489722638")


def test_the_table_is_scikit_learns_wherever_its_file_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = load_digits()
    expected = np.column_stack([raw.data, raw.target])
    read = Mock(wraps=np.loadtxt)
    monkeypatch.setattr(np, "loadtxt", read)
    assert np.array_equal(digits._read_table(), expected) and read.call_count == 1
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    table = digits._read_table()
    assert np.array_equal(table, expected) and table.dtype == np.int64


def test_pixels_are_the_scans_enlarged() -> None:
    train, test = digits.upstream()
    pixels = np.concatenate([train.pixels, test.pixels])
    assert pixels.shape == (1797, 16, 16, 3) and (pixels[..., :1] == pixels).all()
    blocks = pixels[..., 0].reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    raw = load_digits().images.reshape(1797, -1) * 255 / 16
    # means over 2 x 2 blocks are a slight blur of the scan: it is the nearest among all scans
    for image in blocks[::200].reshape(-1, 64):
        nearest = ((raw - image) ** 2).sum(axis=1).argmin()
        assert np.corrcoef(raw[nearest], image)[0, 1] > 0.97


def test_domains_hold_the_same_digits_drawn_differently() -> None:
    domains = digits.downstream()
    assert tuple(domains) == digits.DOMAINS
    means = []
    for images in domains.values():
        assert np.array_equal(images.labels, load_digits().target)
        means.append(images.pixels.mean(axis=(0, 1, 2)))
    gaps = [np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]]
    assert min(gaps) > 20  # even the mean colours are apart
