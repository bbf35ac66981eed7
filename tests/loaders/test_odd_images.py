"""Odd images through every backend: 16-bit grey, turned photographs, thin ones, long texts."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from letheon.errors import UnreadableImage
from letheon.loaders.backends import dali_loader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.map_style import MapStyleImages
from letheon.loaders.decode.pillow import decode
from letheon.loaders.factory import Kind, make_loader
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset
from letheon.loaders.transforms import crop_boxes, geometry
from tests.loaders.test_backends import KINDS, PRESET, TOLERANCE, assert_near

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def pgm16(values: np.ndarray) -> bytes:
    head = f"P5 {values.shape[1]} {values.shape[0]} 65535\n".encode()
    return head + values.astype(">u2").tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "big TIFF"])
def test_of_16_bit_grey_the_high_byte_is_kept(form: str) -> None:
    data = pgm16(RAMP) if form == "PPM" else saved(Image.fromarray(RAMP), form.split()[-1])
    if form == "big TIFF":
        data = saved(Image.fromarray(RAMP.astype(">u2")), "TIFF")
    image = decode(data, "x")
    assert np.array_equal(image, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, 2))
    assert 126 < image.mean() < 129


def test_a_dataset_of_16_bit_images_is_read_the_same() -> None:
    class Deep:
        targets = (0, 1)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.fromarray(RAMP), i

    assert np.array_equal(MapStyleImages(Deep()).read(0)[..., 1], RAMP >> 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_without_a_known_white_is_refused(dtype: type) -> None:
    with pytest.raises(UnreadableImage, match="whose white is not known"):
        decode(saved(Image.fromarray(RAMP.astype(dtype)), "TIFF"), "x")


def test_long_texts_in_a_png_do_not_matter() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 2**22, zip=True)
    data = saved(noise, "PNG", pnginfo=info)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(decode(data, "x"), np.asarray(noise))


@pytest.mark.parametrize("size", [(8000, 1), (1, 8000), (60000, 2)])
@pytest.mark.parametrize("resize", ["short", "crop-square", "square", "none"])
def test_a_thin_image_takes_little(size: tuple[int, int], resize: Any) -> None:
    image = decode(saved(Image.new("RGB", size, (9, 8, 7)), "PNG"), "x")
    preset = Preset(size=224, resize=resize)
    tracemalloc.start()
    square = geometry.fit(image, preset)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert square.shape == (224, 224, 3) and (square == (9, 8, 7)).all()
    if resize in ("short", "crop-square"):
        box = crop_boxes.central(np.array([image.shape[:2]]), preset)
        assert (box[:, 2:] > 0).all()


def test_a_thin_image_shows_its_middle() -> None:
    wave = 127 + 100 * np.sin(np.arange(1200) / 9)[None, :, None] * np.ones((10, 1, 3))
    image, preset = wave.astype(np.uint8), Preset(size=24, resize_to=32)
    whole = geometry.resize(image, 32, 3840, preset)[4:28, 1908:1932]
    assert np.abs(geometry.fit(image, preset).astype(int) - whole).max() <= 12


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of two classes: smooth, and each odd in its way."""
    root = tmp_path_factory.mktemp("odd")
    coarse = Image.fromarray(np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    photo = coarse.resize((96, 80), Image.Resampling.BICUBIC)
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    exif = Image.Exif()
    files = {"grey16.png": saved(Image.fromarray(deep), "PNG"), "grey16.pgm": pgm16(deep)}
    files["grey16.tif"] = saved(Image.fromarray(deep), "TIFF")
    for turn in (1, 2, 3, 5, 6, 8):
        exif[0x0112] = turn
        files[f"turned{turn}.jpg"] = saved(photo, "JPEG", quality=95, exif=exif)
    files["cmyk.jpg"] = saved(photo.convert("CMYK"), "JPEG", quality=95)
    files["progressive.jpg"] = saved(photo, "JPEG", quality=95, progressive=True)
    files["turned.png"] = saved(photo, "PNG", exif=exif)
    for number, (name, data) in enumerate(files.items()):
        file = root / "set" / "ab"[number % 2] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_gives_the_same_pixels(kind: Kind, odd: Path) -> None:
    (images,) = open_source(str(odd / "set")).values()  # type: ignore[union-attr]
    if kind == "ffcv":  # reads its own format alone, made here from the same files
        out = odd / "set.beton"
        write_beton(images, out, Encoding())
        images = BetonImages(out)
    none = np.zeros(len(images), np.bool_)
    plain = next(make_loader("torch", images, none, PRESET, 16, Reader(3)).sweep())
    batch = next(make_loader(kind, images, none, PRESET, 16, Reader(3)).sweep())
    assert_near(batch.images.float(), plain.images, TOLERANCE[kind][1])


def test_no_backend_applies_the_orientation_tag(odd: Path) -> None:
    (images,) = open_source(str(odd / "set")).values()  # type: ignore[union-attr]
    names = [images.path(i) for i in range(len(images))]
    turned = [i for i, name in enumerate(names) if name.endswith("jpg") and "turned" in name]
    assert len(turned) == 6
    assert all(np.array_equal(images.read(i), images.read(turned[0])) for i in turned)


def test_dali_is_told_not_to_turn_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoder of every pipeline, by a stand-in for the package."""
    told: list[Any] = []

    class Fn:
        decoders = SimpleNamespace(
            image=lambda *a, **k: told.append(k), image_slice=lambda *a, **k: told.append(k)
        )

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **options: None

    def pipeline_def(graph: Any) -> Any:
        graph()
        return lambda **options: SimpleNamespace(build=lambda: None)

    types = SimpleNamespace(UINT8=0, INT32=0, FLOAT=0, RGB="RGB", INTERP_LINEAR=0)
    dali = SimpleNamespace(types=types, pipeline_def=pipeline_def)
    modules = {"nvidia.dali": dali, "nvidia.dali.fn": Fn()}
    monkeypatch.setattr(dali_loader.importlib, "import_module", modules.__getitem__)
    loader: Any = SimpleNamespace(device=SimpleNamespace(type="cpu"), workers=1)
    for source in ("jpeg", "image", "decode"):
        for training in (True, False):
            dali_loader._build_pipeline(source, training, 4, loader, PRESET)  # type: ignore[arg-type]
    assert len(told) == 4 and all(options["adjust_orientation"] is False for options in told)
