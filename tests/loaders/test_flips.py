"""A single bit that flips in what was prepared is found, or changes nothing that is read."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from letheon.errors import InputError, UnreadableImage
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages, Data, ImageSet
from letheon.loaders.decode.pillow import decode, pixel_limit
from letheon.loaders.factory import make_loader
from letheon.loaders.formats.arrays import MappedImages
from letheon.loaders.formats.arrays_writer import prepare
from letheon.loaders.formats.beton import BetonImages, manifest_path
from letheon.loaders.formats.beton_set import write_betons
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_source
from letheon.loaders.views import list_notes
from letheon.sealed import read_sealed, seal
from tests.loaders.test_backends import PRESET

FLIPS = 120
"""Single bits of each form: half of them in what is no pixel."""


def content(path: Path) -> list[object]:
    """Everything that is read of a prepared set."""
    found = open_source(str(path))
    sets = {"train": found.train, "test": found.test} if isinstance(found, Data) else found
    out: list[object] = [list(sets), found.names if isinstance(found, Data) else ()]
    for images in sets.values():
        pixels = [images.read(i).tobytes() for i in range(len(images))]
        out += [images.classes, images.labels.tobytes(), pixels, images.digest]
        assert not images.notes
    return out


def write(form: str, folder: Path, photographs: Path) -> Path:
    """A set of that form; the folder of what may be damaged."""
    found = open_source(str(photographs))
    assert isinstance(found, dict)
    if form == "beton":
        write_betons(found, folder / "out", Encoding(raw=0.5, page=2**21))
    elif form == "arrays":
        prepare(found, folder / "out", 16)
    else:
        prepare(found, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("form", ["beton", "arrays", "list"])
def test_every_flip_is_found_or_harmless(form: str, photographs: Path, tmp_path: Path) -> None:
    out = write(form, tmp_path, photographs)
    before = content(out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    rng, found = random.Random(5), 0
    for k in range(FLIPS):
        file = rng.choice(files) if k % 2 else max(files, key=lambda path: path.stat().st_size)
        whole = file.read_bytes()
        # Whole pages of a .beton hold nothing: half of the flips go where something is.
        at = rng.randrange(min(len(whole), 6000) if k % 4 else len(whole))
        with open(file, "r+b") as opened:
            opened.seek(at)
            opened.write(bytes([whole[at] ^ 1 << rng.randrange(8)]))
        try:
            after = content(out)
        except InputError as error:
            assert "\n" not in str(error)
            found += 1
        else:
            assert after == before, f"{file.name} at {at}"
        file.write_bytes(whole)
    assert found > FLIPS // 3 and content(out) == before


@pytest.mark.parametrize("kind", ["torch", "beton", "resident"])
@pytest.mark.parametrize("form", ["beton", "arrays"])
def test_loaders_name_the_damaged_image(
    kind: str, form: str, photographs: Path, tmp_path: Path
) -> None:
    out = write(form, tmp_path, photographs)
    found = open_source(str(out))
    assert isinstance(found, dict)
    ((name, images),) = found.items()
    if isinstance(images, BetonImages):
        file, at = images.file, int(images.table["pointer"][7]) + 40
    else:
        file, at = out / name / "images.npy", 128 + 7 * 16 * 16 * 3
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)
    (again,) = open_source(str(out)).values()  # type: ignore[union-attr]
    forget = np.zeros(len(again), np.bool_)
    with pytest.raises(UnreadableImage, match=r"\[\d+\].*digest"):
        list(make_loader(kind, again, forget, PRESET, 8, Reader(3)).train("mixed", 0))  # type: ignore[arg-type]


def test_a_list_compares_each_file_with_its_digest(photographs: Path, tmp_path: Path) -> None:
    out = write("list", tmp_path, photographs)
    (images,) = open_source(str(out)).values()  # type: ignore[union-attr]
    place = Path(images.path(3))
    before = place.read_bytes()
    try:
        place.write_bytes(Path(images.path(4)).read_bytes())
        with pytest.raises(InputError, match="digest") as refusal:
            images.read(3)
        assert not isinstance(refusal.value, UnreadableImage)  # which may be left out
        assert images.encoded_image(4).data.size
    finally:
        place.write_bytes(before)
    assert images.read(3).ndim == 3


def test_older_sets_are_read_with_a_note(photographs: Path, tmp_path: Path) -> None:
    """Those of the versions before, whose pages have no seal and name no pieces."""
    import json

    for form, page in (("beton", "betons.json"), ("arrays", "set.json")):
        out = write(form, tmp_path / form, photographs)
        before = content(out)
        for file in (out / page, *out.glob("*.beton.json")):
            told = {
                k: v for k, v in read_sealed(file).items() if k not in ("sha256", "index", "pieces")
            }
            told["format"] = told["format"].replace("-2", "-1")
            for part in told["parts"].values() if form == "arrays" else ():
                for key in ("rows", "pieces", "labels"):
                    del part[key]
            file.write_text(json.dumps(told))
        (images,) = open_source(str(out)).values()  # type: ignore[union-attr]
        assert [images.read(i).tobytes() for i in range(len(images))] == before[4]
        assert any("not verified" in line for line in list_notes({"set": images}))


def test_what_a_forked_worker_verified_is_not_verified_again(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (900, 16, 16, 3), dtype=np.uint8)
    prepare(
        {"set": ArrayImages("set", pixels, np.arange(900) % 2, ["a", "b"])}, tmp_path / "out", 16
    )
    (images,) = open_source(str(tmp_path / "out")).values()  # type: ignore[union-attr]
    assert isinstance(images, MappedImages) and images._pieces is not None
    child = os.fork()
    if not child:
        images.read(500)
        os._exit(0)
    os.waitpid(child, 0)
    assert images._pieces._verified.tolist() == [k == 500 // images._rows for k in range(11)]


@pytest.mark.parametrize("form", ["EPS", "PDF", "PCX", "TGA"])
def test_other_formats_are_refused_whatever_the_suffix(form: str, tmp_path: Path) -> None:
    """Of EPS Pillow would start Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", form)
    with pytest.raises(UnreadableImage, match="no known image format: JPEG, PNG"):
        decode((tmp_path / "x.jpg").read_bytes(), "x.jpg")


def test_the_limit_on_pixels_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.new("L", (40, 30)).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    try:
        for text, refused in (("1200", False), ("1199", True)):
            monkeypatch.setenv("LETHEON_MAX_PIXELS", text)
            pixel_limit.cache_clear()
            if refused:
                with pytest.raises(UnreadableImage, match="40 x 30 pixels, over 1199"):
                    decode(data, "x")
            else:
                assert decode(data, "x").shape == (30, 40, 3)
        monkeypatch.setenv("LETHEON_MAX_PIXELS", "many")
        pixel_limit.cache_clear()
        with pytest.raises(InputError, match="LETHEON_MAX_PIXELS=many"):
            decode(data, "x")
    finally:
        pixel_limit.cache_clear()


def special(kind: str, place: Path) -> None:
    """Something that is no regular file."""
    if kind == "FIFO":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(place.parent)  # the path of a socket must be short
            server.bind(place.name)
            os.chdir(here)


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
def test_only_regular_files_are_read(kind: str, draw: Callable[..., Path], tmp_path: Path) -> None:
    root = draw(["a/0.png", "a/1.png", "b/0.png"])
    special(kind, root / "a" / "9.jpg")
    (images,) = open_source(str(root)).values()  # type: ignore[union-attr]
    with pytest.raises(UnreadableImage, match=r"a/9\.jpg.*(FIFO|device|No such device)"):
        images.read(2)
    special(kind, tmp_path / "set.zip")
    with pytest.raises(InputError, match=r"set\.zip.*cannot be read"):
        open_source(str(tmp_path / "set.zip"))


def test_links_in_a_ring_are_left_out_by_name(draw: Callable[..., Path]) -> None:
    root = draw(["a/0.png", "b/0.png"])
    (root / "a" / "up").symlink_to(root)
    (root / "c").symlink_to(root / "a")  # no ring: the same images under another name
    other = root.parent / "other"
    other.mkdir()
    (other / "back").symlink_to(root / "b")
    (root / "b" / "away").symlink_to(other)
    (images,) = open_source(str(root)).values()  # type: ignore[union-attr]
    assert isinstance(images, ImageSet)
    tree = images.tree  # type: ignore[attr-defined]
    assert {"a/up", "c/up", "b/away/back"} <= set(tree.hidden)
    assert len(images) == 3


def test_a_part_of_another_set_is_refused(photographs: Path, tmp_path: Path) -> None:
    out = write("beton", tmp_path / "one", photographs)
    (file,) = out.glob("*.beton")
    told = read_sealed(manifest_path(file))
    manifest_path(file).write_bytes(seal(told | {"pieces": "0" * 64}))
    with pytest.raises(InputError, match="digests.*its digest differs"):
        open_source(str(out))
