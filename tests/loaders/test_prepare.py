"""Prepared sets: the same images, the bad ones listed, all or nothing."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from letheon.errors import InputError
from letheon.loaders.formats.arrays_writer import prepare
from letheon.loaders.formats.parts import run_chunks
from letheon.loaders.open import open_data, open_domains
from letheon.sealed import seal

Drawn = Callable[..., Path]
PATHS = [f"{s}/{c}/{i:02}.jpg" for s in ("train", "val") for c in "ab" for i in range(40)]


class Counted:
    """Work that counts how often it is sent to another process."""

    sent = 0

    def __call__(self, chunk: int) -> int:
        return chunk

    def __getstate__(self) -> dict[str, int]:
        Counted.sent += 1
        return {}


def test_the_work_is_sent_once_to_a_process() -> None:
    """An archive's table of members is, with it: with every chunk it took most of the time."""
    assert sorted(run_chunks(Counted(), range(9), 1)) == list(range(9))
    assert Counted.sent == 1


@pytest.mark.parametrize(
    ("size", "workers"),
    [(12, 0), (None, 0), (12, 2), pytest.param(None, 2, marks=pytest.mark.slow)],
)
def test_bad_images_are_left_out_and_listed(
    draw: Drawn, tmp_path: Path, size: int | None, workers: int
) -> None:
    root = draw(PATHS, size=(12, 12))
    (root / "train/a/03.jpg").write_bytes(b"")
    whole = (root / "train/b/05.jpg").read_bytes()
    (root / "train/b/05.jpg").write_bytes(whole[: len(whole) // 2])
    before = open_data(str(root))
    report = prepare(before, tmp_path / "out", size=size, workers=workers)
    assert report.counts == {"train": 78, "test": 80} and len(report.quarantined) == 2
    with open(tmp_path / "out" / "quarantine.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["file"].rpartition("/train/")[2] for row in listed] == ["a/03.jpg", "b/05.jpg"]
    assert "0 bytes" in listed[0]["reason"] and "truncated" in listed[1]["reason"]

    data = open_data(str(tmp_path / "out"))
    assert data.classes == before.classes and data.names == before.names
    kept = [i for i in range(80) if i not in (3, 45)]
    assert np.array_equal(data.train.labels, before.train.labels[kept])
    for row, i in enumerate(kept):
        assert np.array_equal(data.train.read(row), before.train.read(i))
    again = pickle.loads(pickle.dumps(data.train))
    assert np.array_equal(again.read(9), data.train.read(9)) and again.digest == data.train.digest
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.parts"))


def test_equal_pixels_have_equal_digests_and_others_do_not(draw: Drawn, tmp_path: Path) -> None:
    data = open_data(str(draw(PATHS)))
    prepare(data, tmp_path / "one", size=8)
    prepare(data, tmp_path / "two", size=8, workers=0)
    prepare(data, tmp_path / "three", size=9, workers=0)
    one, two, three = (open_data(str(tmp_path / n)).train for n in ("one", "two", "three"))
    assert one.digest == two.digest != three.digest
    assert one.read(0).shape == (8, 8, 3)
    assert isinstance(one.read_many(np.array([1, 5])), np.ndarray)


def test_domains_and_digits(draw: Drawn, tmp_path: Path) -> None:
    root = draw([f"{d}/{c}/0.jpg" for d in ("Art", "Real World") for c in "ab"])
    prepare(open_domains(str(root)), tmp_path / "domains", size=8)
    assert list(open_domains(str(tmp_path / "domains"))) == ["Art", "Real_World"]
    digits = open_data("digits")
    prepare(digits, tmp_path / "digits", size=16)
    assert open_data(str(tmp_path / "digits")).test.digest == digits.test.digest
    with pytest.raises(InputError, match="no size"):
        prepare(digits, tmp_path / "other")


def test_all_or_nothing(draw: Drawn, tmp_path: Path) -> None:
    root = draw(["train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg", "val/b/0.jpg"])
    data = open_data(str(root))
    (tmp_path / "there" / "photo").mkdir(parents=True)
    with pytest.raises(InputError, match="exists"):
        prepare(data, tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepare(data, tmp_path / "file" / "out")
    (root / "train/b/0.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="no readable image of class 'b'"):
        prepare(data, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_a_broken_or_newer_set_is_refused(draw: Drawn, tmp_path: Path) -> None:
    data = open_data(str(draw(PATHS[::20])))
    prepare(data, tmp_path / "out", size=8)
    told = tmp_path / "out" / "set.json"
    text = told.read_text()
    for content, message in (
        (text[:-40], "broken file"),
        (text.replace("letheon-set-2", "letheon-set-9"), "not what its digest says"),
        (seal(json.loads(text) | {"format": "letheon-set-9"}).decode(), "'letheon-set-9'"),
        (text.replace('"sha256"', '"sha257"'), "with its digest"),
        (seal(json.loads(text) | {"parts": {"train": {}}}).decode(), "broken prepared set"),
        (seal(json.loads(text) | {"parts": {"../x": {}}}).decode(), "'../x'"),
        ("[]", "a list"),
        ("[" * 100_000, "broken file"),
    ):
        told.write_text(content)
        with pytest.raises(InputError, match=message):
            open_data(str(tmp_path / "out"))


def test_a_flipped_bit_of_the_labels_names_their_file(draw: Drawn, tmp_path: Path) -> None:
    prepare(open_data(str(draw(PATHS))), tmp_path / "prepared", size=8, workers=0)
    file = tmp_path / "prepared" / "test" / "labels.npy"
    whole = file.read_bytes()
    for bit in (8 * 128, 8 * 128 + 53):  # another class; a class that there is none of
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(InputError, match=r"test/labels\.npy: got labels that are not those"):
            open_data(str(tmp_path / "prepared"))
