"""Geometry against torchvision's and Pillow's, augmentation against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from letheon.loaders.preset import Preset
from letheon.loaders.transforms import augment, geometry
from letheon.loaders.transforms.normalize import normalize


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (33, 33)])
def test_short_rule_is_torchvisions(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    planes = torch.from_numpy(image).permute(2, 0, 1)
    usual = v2.Compose([v2.Resize(36, antialias=True), v2.CenterCrop(32)])
    expected = usual(planes).permute(1, 2, 0).numpy()
    got = geometry.fit(image, Preset(size=32, resize="short", resize_to=36))
    assert np.array_equal(got, expected)


def test_square_and_crop_square_rules_by_pillow() -> None:
    image = noise(51, 70)
    squeezed = Image.fromarray(image).resize((40, 40), Image.Resampling.BILINEAR)
    expected = np.asarray(squeezed)[4:36, 4:36].astype(int)
    got = geometry.fit(image, Preset(size=32, resize="square", resize_to=40)).astype(int)
    assert abs(got - expected).max() <= 1  # rounding to bytes differs between the two
    side = 51 * 32 // 40
    cut = image[(51 - side + 1) // 2 :][:side, (70 - side + 1) // 2 :][:, :side]
    expected = np.asarray(Image.fromarray(cut).resize((32, 32), Image.Resampling.BICUBIC))
    preset = Preset(size=32, resize="crop-square", resize_to=40, interpolation="bicubic")
    assert abs(geometry.fit(image, preset).astype(int) - expected.astype(int)).max() <= 1


def test_normalized_by_hand() -> None:
    images = np.stack([noise(8, 8), noise(8, 8)[::-1]])
    preset = Preset(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    got = normalize(images, preset)
    expected = (images.transpose(0, 3, 1, 2) / 255 - np.array(preset.mean)[:, None, None]) / (
        np.array(preset.std)[:, None, None]
    )
    assert got.shape == (2, 3, 8, 8) and got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_shift_crops_the_zero_padded_image() -> None:
    preset = Preset(size=16, resize="none", augment="shift")
    images = np.stack([noise(16, 16)] * 200)
    u = augment.draws(0, 0, np.zeros(200, np.int64), np.arange(200), preset)
    padded = np.pad(images[0], ((2, 2), (2, 2), (0, 0)))
    windows = {padded[t : t + 16, x : x + 16].tobytes(): (t, x) for t in range(5) for x in range(5)}
    found = {windows[image.tobytes()] for image in geometry.augment_images(images, u, preset)}
    assert len(found) == 25  # every offset occurs, and nothing but crops (so no mirror)


@pytest.mark.parametrize(("kind", "pad"), [("", 2), ("-near", 1)])
def test_alternating_flip_and_reflected_crop_by_their_definition(kind: str, pad: int) -> None:
    """Every window of the mirror-padded image, one way in even epochs and the other in odd ones."""
    preset = Preset(size=16, resize="none", augment=f"reflect-crop-alternate{kind}")  # type: ignore[arg-type]
    images = np.stack([noise(16, 16)] * 300)
    samples, turn = np.arange(300), np.zeros(300, np.int64)
    padded = np.pad(images[0], ((pad, pad), (pad, pad), (0, 0)), "reflect")
    span = range(2 * pad + 1)
    windows: dict[bytes, tuple[int, int, bool]] = {}
    for t in span:
        for x in span:
            window = padded[t : t + 16, x : x + 16]
            windows[window.tobytes()] = (t, x, False)
            windows[window[:, ::-1].tobytes()] = (t, x, True)
    mirrored = []
    for epoch, turns in ((0, turn), (1, turn), (2, turn), (2, turn + 1)):
        u = augment.draws(5, epoch, turns, samples, preset)
        assert u.min() >= 0 and u.max() < 1
        found = [windows[image.tobytes()] for image in geometry.augment_images(images, u, preset)]
        assert len({place[:2] for place in found}) == len(span) ** 2
        mirrored.append(np.array([place[2] for place in found]))
    first, second, third, again = mirrored
    assert 100 < first.sum() < 200
    assert (second == ~first).all() and (third == first).all() and (again == second).all()
    part = augment.draws(5, 1, turn[:7], samples[40:47], preset)  # of the sample, not its place
    assert (augment.mirror_mask(part, preset) == second[40:47]).all()


def test_mirror_flips_about_half() -> None:
    preset = Preset(size=16, resize="none", augment="flip")
    images = np.stack([noise(16, 16)] * 400)
    before = images.copy()
    u = augment.draws(0, 0, np.zeros(400, np.int64), np.arange(400), preset)
    out = geometry.augment_images(images, u, preset)
    same = (out == before).all(axis=(1, 2, 3))
    flipped = (out == before[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ flipped).all() and 150 < same.sum() < 250
    assert np.array_equal(images, before)


def test_resized_crops_stay_inside_with_the_stated_area_and_ratio() -> None:
    n = 4000
    preset = Preset(size=8)
    u = augment.draws(3, 1, np.zeros(n, np.int64), np.arange(n), preset)
    shapes = np.tile([[300, 400]], (n, 1))
    top, left, height, width = augment.boxes(u, shapes).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 300).all() and (left + width <= 400).all()
    area, ratio = height * width / 120000, width / height
    assert area.min() > 0.079 and area.max() <= 1
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    # torchvision's own sampler as the truth for the distribution after rejection
    image = torch.empty(3, 300, 400)
    boxes = [
        v2.RandomResizedCrop(8).make_params([image])  # type: ignore[no-untyped-call]
        for _ in range(n)
    ]
    theirs = np.array([box["height"] * box["width"] for box in boxes]) / 120000
    assert abs(area.mean() - theirs.mean()) < 0.02
    assert abs(np.quantile(area, 0.9) - np.quantile(theirs, 0.9)) < 0.04


def test_resized_crop_of_a_sliver_is_central() -> None:
    u = augment.draws(0, 0, np.zeros(1, np.int64), np.arange(1), Preset(size=8))
    assert augment.boxes(u, np.array([[10, 1000]])).tolist() == [[0, 493, 10, 13]]


def test_draws_are_a_function_of_seed_epoch_turn_and_sample() -> None:
    preset = Preset(size=8)
    index = np.array([4, 9, 4, 7])
    turn = np.array([0, 0, 1, 2])
    together = augment.draws(1, 2, turn, index, preset)
    for row, (i, t) in enumerate(zip(index, turn, strict=True)):
        alone = augment.draws(1, 2, np.array([t]), np.array([i]), preset)
        assert np.array_equal(alone[0], together[row])
    assert not np.array_equal(together[0], together[2])
    assert not np.array_equal(together, augment.draws(1, 3, turn, index, preset))
    assert not np.array_equal(together, augment.draws(2, 2, turn, index, preset))
