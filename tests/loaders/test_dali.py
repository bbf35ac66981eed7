"""DALI on the CPU: what it may be given, and what happens when it fails."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from letheon.errors import InputError
from letheon.loaders.backends import dali_loader
from letheon.loaders.backends.dali_loader import DaliLoader
from letheon.loaders.backends.threaded_loader import BetonLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.factory import CacheOptions, make_loader
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset
from letheon.loaders.views import drop_unreadable

PRESET = Preset(size=32, resize_to=40)
needs_dali = pytest.mark.skipif(not dali_loader.is_installed(), reason="DALI is not installed")


def folder(tmp_path: Path, changed: bytes | None = None) -> ImageSet:
    """Twelve images: JPEGs, one of them CMYK, one a PNG, maybe one that is `changed`."""
    for number in range(12):
        image = Image.linear_gradient("L").resize((50 + number, 60)).convert("RGB")
        out = io.BytesIO()
        if number == 3:
            image.convert("CMYK").save(out, "JPEG")
        else:
            image.save(out, "PNG" if number == 5 else "JPEG")
        file = tmp_path / "set" / "ab"[number % 2] / f"{number:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(changed if changed is not None and number == 8 else out.getvalue())
    (found,) = open_source(str(tmp_path / "set")).values()  # type: ignore[union-attr]
    assert isinstance(found, ImageSet)
    return found


@needs_dali
def test_other_formats_go_round_dali(tmp_path: Path) -> None:
    images = folder(tmp_path)
    none = np.zeros(12, np.bool_)
    one = next(DaliLoader(images, none, PRESET, 12, Reader(0)).train("mixed", 0))
    other = next(BetonLoader(images, none, PRESET, 12, Reader(0)).train("mixed", 0))
    assert torch.equal(one.index, other.index)
    assert (one.images - other.images).abs().mean() * 58 < 0.5


@needs_dali
@pytest.mark.parametrize("fault", ["cut", "cut but ended", "empty", "text"])
def test_a_broken_image_is_named_or_left_out_and_the_rest_goes_on(
    tmp_path: Path, fault: str
) -> None:
    out = io.BytesIO()
    Image.effect_noise((60, 60), 90).convert("RGB").save(out, "JPEG")
    half = out.getvalue()[: len(out.getvalue()) // 2]
    data = {"cut": half, "cut but ended": half + b"\xff\xd9", "empty": b"", "text": b"<html>"}
    images = folder(tmp_path, data[fault])
    none = np.zeros(12, np.bool_)
    plain = make_loader("torch", images, none, PRESET, 4, Reader(0))
    try:
        list(plain.train("mixed", 0))
    except InputError as error:
        if fault == "cut but ended":
            pytest.xfail("damage below the crop is not met by a loader that decodes the crop alone")
        with pytest.raises(InputError) as caught:
            list(DaliLoader(images, none, PRESET, 4, Reader(0)).train("mixed", 0))
        assert str(caught.value) == str(error)
        good = drop_unreadable(images)
        assert good.left_out == (str(error),)
        loader = DaliLoader(good, none[1:], PRESET, 4, Reader(0))
        for _ in range(2):
            assert sum(len(batch.labels) for batch in loader.train("mixed", 0)) == 11
    else:
        assert fault == "cut but ended"  # a warning for Pillow too


def test_what_dali_cannot_do_is_said(tmp_path: Path) -> None:
    images = folder(tmp_path)
    preset = Preset(size=32, augment="shift")
    with pytest.raises(InputError, match="shift" if dali_loader.is_installed() else "pip install"):
        make_loader("dali", images, np.zeros(12, np.bool_), preset, 4, Reader(0))


@needs_dali
def test_decoded_images_are_kept_and_change_no_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, none = folder(tmp_path), np.zeros(12, np.bool_)
    lines: list[str] = []
    plain = DaliLoader(images, none, PRESET, 5, Reader(0))
    for room, kept in ((2**20, 10), (30_000, 3)):  # 50 x 60 and larger: 9,000 bytes and more
        loader = DaliLoader(images, none, PRESET, 5, Reader(0), cache=room, tell=lines.append)
        for epoch in (0, 1):
            mine, theirs = loader.train("mixed", epoch), plain.train("mixed", epoch)
            for one, other in zip(mine, theirs, strict=True):
                assert torch.equal(one.index, other.index)
                assert (one.images - other.images).abs().max() * 58 < 1.1
        for one, other in zip(loader.sweep(), plain.sweep(), strict=True):
            assert torch.equal(one.images, other.images)
        assert len(loader._decoded) == kept  # neither the CMYK image nor the PNG
        assert sum(image.nbytes for image in loader._decoded.values()) <= room
    assert lines[0].startswith("loader dali keeps decoded images: up to 0.00 GiB of ")
    seen: list[str] = []
    run = DaliLoader._run
    monkeypatch.setattr(
        DaliLoader, "_run", lambda self, *args: (seen.append(args[0]), run(self, *args))[1]
    )
    loader = DaliLoader(images, none, PRESET, 12, Reader(0), cache=2**20)
    for epoch in (0, 1):
        list(loader.train("mixed", epoch))
    assert seen == ["image", "image"]


@needs_dali
def test_a_cache_that_does_not_fit_or_serves_no_one_is_refused(tmp_path: Path) -> None:
    images, none = folder(tmp_path), np.zeros(12, np.bool_)
    with pytest.raises(InputError, match="got a cache of 1048576.00 GiB"):
        make_loader(
            "dali", images, none, PRESET, 5, Reader(0), caches=CacheOptions(dali_cache=2.0**20)
        )
    with pytest.raises(InputError, match="dali cache of 1.0 with the loader beton"):
        make_loader(
            "beton", images, none, PRESET, 5, Reader(0), caches=CacheOptions(dali_cache=1.0)
        )
    with pytest.raises(InputError, match="resident shard with the loader dali"):
        make_loader(
            "dali", images, none, PRESET, 5, Reader(0), caches=CacheOptions(resident_shard=True)
        )
