"""`.beton` files: what is written, by the format's definition, and what is read back."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from letheon.errors import InputError
from letheon.folders import new_folder
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ArrayImages, Data
from letheon.loaders.decode.pillow import decode
from letheon.loaders.formats import beton, beton_writer, parts
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_set import is_betons, open_betons, write_betons
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_source


def files_of(root: Path) -> FileImages:
    found = open_source(str(root))
    assert isinstance(found, dict)
    (images,) = found.values()
    assert isinstance(images, FileImages)
    return images


def blobs(path: Path) -> list[tuple[int, int, int, int, int, int, bytes]]:
    """(mode, width, height, label, index, pointer, bytes) of each sample, by struct alone."""
    data = path.read_bytes()
    version, fields, page, samples, table = struct.unpack_from("<HHIQQ", data)
    assert (version, fields) == (2, 3)
    described = [data[24 + 1041 * k :][:17] for k in range(3)]
    names = [(head[0], head[1:].rstrip(b"\0")) for head in described]
    assert names == [(2, b"image"), (1, b"label"), (1, b"index")]
    sizes = dict(struct.unpack_from("<QQ", data, at + 8) for at in range(table, len(data), 24))
    out = []
    for k in range(samples):
        at = 24 + 3 * 1041 + 32 * k
        mode, width, height, pointer = struct.unpack_from("<BHHQ", data, at)
        label, index = struct.unpack_from("<qq", data, at + 16)
        size = sizes[pointer]
        assert pointer // page == (pointer + size - 1) // page  # none lies across a page's edge
        assert pointer >= page and pointer + size <= table
        out.append((mode, width, height, label, index, pointer, data[pointer : pointer + size]))
    return out


def test_the_file_is_what_the_format_says(photographs: Path, tmp_path: Path) -> None:
    images = files_of(photographs)
    out = tmp_path / "set.beton"
    written = write_beton(images, out, Encoding(raw=0.5, page=2**21))
    found = blobs(out)
    assert written.samples == len(found) == len(images) == 34
    assert 5 < written.counts["raw"] < 29
    assert written.counts["raw"] + written.counts["passed through"] == 34
    for i, (mode, width, height, label, index, _, data) in enumerate(found):
        original = images.tree.read(images.file(i))
        pixels = decode(original, "x")
        assert (height, width, label, index) == (*pixels.shape[:2], images.labels[i], i)
        assert data == (pixels.tobytes() if mode == 1 else original)


def test_what_was_written_is_read(photographs: Path, tmp_path: Path) -> None:
    images = files_of(photographs)
    write_beton(images, tmp_path / "set.beton", Encoding(raw=0.5))
    back = pickle.loads(pickle.dumps(BetonImages(tmp_path / "set.beton")))
    assert back.classes == images.classes and back.name == images.name
    assert np.array_equal(back.labels, images.labels)
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(images))[:12].tolist():
        assert np.array_equal(back.read(i), images.read(i))
        assert back.source(i) == images.file(i)


def test_the_manifest_tells_digests_and_settings(photographs: Path, tmp_path: Path) -> None:
    images = files_of(photographs)
    out = tmp_path / "set.beton"
    write_beton(images, out, Encoding(raw=0.3))
    told = json.loads(beton.manifest_path(out).read_text(encoding="utf-8"))
    assert told["file"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert told["source"] == images.digest and told["encoding"]["raw"] == 0.3
    with open(beton.listing_path(out), newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    sums = [hashlib.sha256(blob[-1]).hexdigest() for blob in blobs(out)]
    assert [row["sha256"] for row in listed] == sums
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.parts"))
    write_beton(images, tmp_path / "again.beton", Encoding(raw=0.3))
    assert BetonImages(tmp_path / "again.beton").digest == BetonImages(out).digest
    write_beton(images, tmp_path / "other.beton", Encoding(raw=0.4))
    assert BetonImages(tmp_path / "other.beton").digest != BetonImages(out).digest


def test_processes_change_no_byte(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = files_of(photographs)
    write_beton(images, tmp_path / "one.beton", Encoding(raw=0.5))
    write_beton(images, tmp_path / "two.beton", Encoding(raw=0.5), workers=2)
    assert (tmp_path / "one.beton").read_bytes() == (tmp_path / "two.beton").read_bytes()


class Stopping(ArrayImages):
    """Stops after a number of reads, as a killed run does."""

    reads = 0
    limit = 0

    def read(self, i: int) -> np.ndarray:
        if self.reads == self.limit:
            raise KeyboardInterrupt
        self.reads += 1
        return super().read(i)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CHUNK", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (22, 20, 24, 3), dtype=np.uint8)
    images = Stopping("some", pixels, np.arange(22) % 2, ["a", "b"])
    images.limit = 10
    with pytest.raises(KeyboardInterrupt):
        write_beton(images, tmp_path / "set.beton")
    assert not (tmp_path / "set.beton").exists()
    images.limit = 100
    write_beton(images, tmp_path / "set.beton")
    assert images.reads == 10 + 22 - 8  # two chunks were whole
    plain = ArrayImages("some", pixels, np.arange(22) % 2, ["a", "b"])
    write_beton(plain, tmp_path / "plain.beton")
    assert (tmp_path / "set.beton").read_bytes() == (tmp_path / "plain.beton").read_bytes()


def test_other_settings_do_not_go_on_with_old_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CHUNK", 4)
    images = Stopping("s", np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, np.int64), ["a"])
    images.limit = 6
    with pytest.raises(KeyboardInterrupt):
        write_beton(images, tmp_path / "set.beton")
    images.limit = 100
    write_beton(images, tmp_path / "set.beton", Encoding(raw=1))
    assert BetonImages(tmp_path / "set.beton").manifest["counts"] == {"raw": 9}


def test_large_images_are_made_smaller_by_area(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 60, 90, 3), dtype=np.uint8)
    images = ArrayImages("some", pixels, np.zeros(3, np.int64), ["a"])
    write_beton(images, tmp_path / "set.beton", Encoding(max_side=45, raw=1))
    small = BetonImages(tmp_path / "set.beton").read(1)
    assert small.shape == (30, 45, 3)
    means = pixels[1].reshape(30, 2, 45, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - means).max() <= 1


def dirty(root: Path) -> dict[str, bytes]:
    """Files by name, of the kinds that ImageNet holds and some worse."""
    gradient = Image.linear_gradient("L").resize((40, 30))

    def saved(mode: str, form: str, **options: object) -> bytes:
        out = io.BytesIO()
        gradient.convert(mode).save(out, form, **options)
        return out.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    good = saved("RGB", "JPEG")
    png = bytearray(saved("RGB", "PNG"))
    png[16:24] = struct.pack(">II", 30000, 30000)  # stated, not there; also a wrong checksum
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    assert len(huge.getvalue()) < 120_000
    return {
        "good.jpg": good,
        "cmyk.JPEG": saved("CMYK", "JPEG"),
        "png named.JPEG": saved("RGB", "PNG"),
        "grey.jpg": saved("L", "JPEG"),
        "turned.jpg": saved("RGB", "JPEG", exif=exif.tobytes()),
        "naïve 图.jpg": good,
        "cut.jpg": good[:-300],
        "empty.jpg": b"",
        "liar.png": bytes(png),
        "bomb.png": huge.getvalue(),
        "text.jpg": b"<html>not found</html>",
    }


def test_dirty_images_are_counted_named_and_left_out(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for folder in ("a", "b"):
        (root / folder).mkdir(parents=True)
    (root / "a" / "folder.jpg").mkdir()  # a directory in the list
    for name, data in dirty(root).items():
        (root / "a" / name).write_bytes(data)
    (root / "b" / "good.jpg").write_bytes(dirty(root)["good.jpg"])
    images = files_of(root)
    written = write_beton(images, tmp_path / "set.beton")
    left_out = {Path(path).name: reason for path, reason in written.quarantined}
    assert set(left_out) == {"cut.jpg", "empty.jpg", "liar.png", "bomb.png", "text.jpg"}
    assert "81000000" in left_out["bomb.png"] or "9000 x 9000" in left_out["bomb.png"]
    assert written.counts == {
        "CMYK converted": 1,
        "EXIF rotation ignored": 1,
        "PNG named jpeg": 1,
        "encoded": 2,
        "grey": 1,
        "passed through": 5,
    }
    back = BetonImages(tmp_path / "set.beton")
    kept = {back.source(k).rpartition("/")[2]: back.read(k) for k in range(len(back))}
    assert len(back) == 7 and np.ptp(kept["cmyk.JPEG"].mean(axis=(1, 2))) > 100
    assert kept["turned.jpg"].shape == (30, 40, 3)  # the tag is not applied
    told = back.manifest["quarantined"]
    assert {Path(entry["path"]).name for entry in told} == set(left_out)
    index = [blob[4] for blob in blobs(tmp_path / "set.beton")]
    assert [images.file(i) for i in index] == [back.source(k) for k in range(7)]


def test_a_class_that_is_lost_is_an_error(tmp_path: Path) -> None:
    for folder, data in (("a", dirty(tmp_path)["good.jpg"]), ("b", b"")):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "x.jpg").write_bytes(data)
    with pytest.raises(InputError, match="no readable image of class 'b'"):
        write_beton(files_of(tmp_path / "set"), tmp_path / "set.beton")


def test_what_is_no_beton_file_is_refused(photographs: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.beton"
    write_beton(files_of(photographs), path)
    with pytest.raises(InputError, match="exists"):
        write_beton(files_of(photographs), path)
    whole = path.read_bytes()
    for name, data, reason in (
        ("short", whole[:10], "10 bytes"),
        ("other", b"\x07" + whole[1:], "version 7"),
        ("cut", whole[: len(whole) // 2], "after the file"),
        ("fields", whole[:500], "header ends after"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=reason):
            BetonImages(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        BetonImages(tmp_path / "nowhere")
    beton.manifest_path(path).write_text("{}")
    with pytest.raises(InputError, match="broken file"):
        BetonImages(path)


def test_a_million_samples_open_in_little_memory(tmp_path: Path) -> None:
    n = 1_000_000
    path = tmp_path / "large.beton"
    table = np.zeros(n, beton_writer.ROW)
    start = 5 * 2**23  # after the table
    pointers = start + np.random.default_rng(0).permutation(n).astype(np.uint64) * 8
    table["f0"]["pointer"], table["f1"] = pointers, np.arange(n) % 1000
    blob = np.zeros(n, beton.BLOB)
    order = np.argsort(pointers)
    blob["sample"], blob["pointer"], blob["size"] = order, pointers[order], 8
    end = start + n * 8
    with open(path, "wb") as file:
        beton_writer._write_head(file, table, end, 2**23)
        file.seek(end)
        file.write(blob.tobytes())
    del table, pointers, blob, order
    tracemalloc.start()
    images = BetonImages(path)
    assert len(images) == n and len(images.classes) == 1000
    stored = images.read_encoded(np.array([5, 999_999, 0]))
    assert [len(one.data) for one in stored] == [8, 8, 8]
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_a_set_of_splits_or_domains_goes_into_a_folder_and_comes_back(
    photographs: Path, tmp_path: Path
) -> None:
    images = files_of(photographs)
    data = Data(images, images, (("a", "ant"), ("b", "bee")), ("a note",))
    (written,) = write_betons(data, tmp_path / "splits").values()
    assert written.samples == 34 and is_betons(tmp_path / "splits")
    back = open_betons(tmp_path / "splits")
    assert isinstance(back, Data)
    assert (back.names, back.notes, back.test) == (data.names, data.notes, back.train)
    assert np.array_equal(back.train.labels, images.labels)
    small = ArrayImages("small", np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2, ["a", "b"])
    parts = {"photo": images, "sketch": small}
    write_betons(parts, tmp_path / "domains")
    domains = open_betons(tmp_path / "domains")
    assert isinstance(domains, dict) and list(domains) == ["photo", "sketch"]
    assert [len(part) for part in domains.values()] == [34, 4]
    with pytest.raises(InputError, match="holds a set"):
        write_betons(parts, tmp_path / "domains")


def test_a_stopped_set_goes_on_beside_its_place(photographs: Path, tmp_path: Path) -> None:
    """What is there already stays as it is; other settings begin anew; the set appears whole."""
    images, out = files_of(photographs), tmp_path / "domains"
    small = Stopping("small", np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2, ["a", "b"])
    small.limit = 2
    domains = {"photo": images, "sketch": small}
    with pytest.raises(KeyboardInterrupt):
        write_betons(domains, out)
    growing = new_folder(out)
    assert not out.exists() and not is_betons(growing)
    before = (growing / "photo.beton").stat().st_mtime_ns
    small.limit = 100
    assert write_betons(domains, out)["photo"].path == out / "photo.beton"
    assert (out / "photo.beton").stat().st_mtime_ns == before and not growing.exists()
    out.rename(growing)
    (growing / parts.ABOUT).write_text("{}")  # as of another version
    write_betons(domains, out, Encoding(quality=50))
    assert (out / "photo.beton").stat().st_mtime_ns != before
    assert BetonImages(out / "photo.beton").manifest["encoding"]["quality"] == 50
