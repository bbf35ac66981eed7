"""Images that cannot be read: an error that names them, or a set without them; never another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from letheon.errors import InputError
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages, Data, ImageSet
from letheon.loaders.factory import Kind, make_loader
from letheon.loaders.forget_request import resolve
from letheon.loaders.formats.arrays_writer import prepare
from letheon.loaders.formats.beton import BetonImages
from letheon.loaders.formats.beton_set import write_betons
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_data, open_domains, open_source
from letheon.loaders.options import DataOptions
from letheon.loaders.views import RelabeledImages, drop_unreadable, list_notes
from tests.launch_tools import Scripts, script_on
from tests.loaders.test_backends import KINDS, PRESET, TOLERANCE, assert_near
from tests.pool import on_ranks

NONE = np.zeros(34, np.bool_)


@pytest.fixture(scope="module")
def images(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> BetonImages:
    out = tmp_path_factory.mktemp("beton") / "set.beton"
    (found,) = open_source(str(photographs)).values()  # type: ignore[union-attr]
    write_beton(found, out, Encoding(raw=0.4))
    return BetonImages(out)


@pytest.fixture(scope="module")
def broken(
    images: BetonImages, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BetonImages, list[int]]:
    """The same file with the second half of two JPEGs wiped out, and those samples.

    The second keeps the mark of its end, without which Pillow itself would refuse it.
    """
    samples = np.flatnonzero(images.table["mode"] == 0)[[0, 5]].tolist()
    data = bytearray(images.file.read_bytes())
    for i in samples:
        (one,) = images.read_encoded(np.array([i]))
        start = int(images.table["pointer"][i])
        end = len(one.data) - (2 if i == samples[1] else 0)
        data[start + len(one.data) // 2 : start + end] = bytes(end - len(one.data) // 2)
    out = tmp_path_factory.mktemp("broken") / "broken.beton"
    out.write_bytes(data)
    return BetonImages(out), samples


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_broke_is_named(kind: Kind, broken: tuple[BetonImages, list[int]]) -> None:
    worse, samples = broken
    either = "|".join(map(str, samples))
    with pytest.raises(InputError, match=rf"broken\.beton\[({either})\].*unreadable"):
        list(make_loader(kind, worse, NONE, PRESET, 8, Reader(3)).train("mixed", 0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_counted_named_and_replaced_by_nothing(
    kind: Kind, images: BetonImages, broken: tuple[BetonImages, list[int]]
) -> None:
    worse, samples = broken
    good = drop_unreadable(RelabeledImages(worse, ("z", *worse.classes)))
    assert len(good) == 32 and len(good.left_out) == 2
    assert all(f"[{i}]" in text for i, text in zip(samples, good.left_out, strict=True))
    assert list_notes({"x": good})[0].startswith("left out 2 unreadable of 34 images of x: ")
    forget = np.arange(32) % 4 == 0
    mine = list(make_loader(kind, good, forget, PRESET, 8, Reader(3)).sweep())
    rest = np.setdiff1d(np.arange(34), samples)
    whole = list(make_loader(kind, images, NONE, PRESET, 8, Reader(3)).sweep(rest.tolist()))
    for one, other in zip(mine, whole, strict=True):  # the very images that are left, in order
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels + 1)
        assert np.array_equal(rest[one.index], other.index)
    plain = make_loader("torch", good, forget, PRESET, 8, Reader(3))
    for world in (1, 2, 3):
        loaders = [
            make_loader(kind, good, forget, PRESET, 8, Reader(3, r, world)) for r in range(world)
        ]
        steps = zip(*(one.train("mixed", 2) for one in loaders), strict=True)
        for parts, truth in zip(steps, plain.train("mixed", 2), strict=True):
            assert {part.total for part in parts} == {len(truth.labels)}  # no batch comes short
            assert torch.equal(torch.cat([part.index for part in parts]), truth.index)
            together = torch.cat([part.images for part in parts])
            assert_near(together, truth.images, TOLERANCE[kind][0])


def test_a_set_that_is_whole_is_itself(images: BetonImages, array_images: Any) -> None:
    assert drop_unreadable(images) is images and images.left_out == ()
    arrays = array_images(5)
    assert drop_unreadable(arrays) is arrays


def test_a_file_that_is_no_image_and_a_set_of_none(tmp_path: Path, photographs: Path) -> None:
    root = tmp_path / "set"
    for name, data in (("a/empty.jpg", b""), ("b/text.jpg", b"<html>")):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(data)
    (found,) = open_source(str(root)).values()  # type: ignore[union-attr]
    with pytest.raises(InputError, match="none of the 2 images can be read"):
        drop_unreadable(found)
    file = next((photographs / "a").iterdir())
    for name in "ab":
        (root / name / "good.jpg").write_bytes(file.read_bytes())
    (found,) = open_source(str(root)).values()  # type: ignore[union-attr]
    good = drop_unreadable(found)
    assert [good.path(i) for i in range(len(good))] == [str(root / c / "good.jpg") for c in "ab"]
    assert good.labels.tolist() == [0, 1]
    assert isinstance(good, ImageSet) and good.digest != found.digest
    assert "empty.jpg" in good.left_out[0] and "text.jpg" in good.left_out[1]


def test_numbers_of_samples_are_refused_where_they_have_changed(
    broken: tuple[BetonImages, list[int]], tmp_path: Path
) -> None:
    good = drop_unreadable(broken[0])
    (tmp_path / "list").write_text("3\n")
    data = Data(good, good, tuple((name,) for name in good.classes))
    with pytest.raises(InputError, match="2 unreadable images left out, which changes the numbers"):
        resolve(f"samples:{tmp_path / 'list'}", data)


def split(photographs: Path, root: Path) -> Path:
    """train/ and val/ of the photographs, one file of each cut short."""
    for side in ("train", "val"):
        for file in sorted(photographs.rglob("*.*")):
            place = root / side / file.parent.name / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
        victim = root / side / "a" / "02.jpg"
        victim.write_bytes(victim.read_bytes()[:900])
    return root


def test_a_replaced_file_of_a_list_is_not_left_out(photographs: Path, tmp_path: Path) -> None:
    source = split(photographs, tmp_path / "data")
    prepare(open_source(str(source)), tmp_path / "list")
    good = sorted((source / "train/a").iterdir())
    good[1].write_bytes(good[2].read_bytes())
    opened = open_data(str(tmp_path / "list"))
    refusal = "another content than was prepared"
    with pytest.raises(InputError, match=refusal):
        drop_unreadable(opened.train)
    with pytest.raises(InputError, match=refusal):
        prepare(opened, tmp_path / "arrays", 8)
    with pytest.raises(InputError, match=refusal):
        write_betons(opened, tmp_path / "betons")


def test_damaged_arrays_of_a_prepared_set_are_left_out(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    prepare({"set": ArrayImages("set", pixels, np.arange(40) % 2, ["a", "b"])}, tmp_path / "x", 64)
    place = tmp_path / "x/set/images.npy"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    (opened,) = open_domains(str(tmp_path / "x")).values()
    readable = drop_unreadable(opened)
    assert 0 < len(readable) < 40 and "its bytes are not those" in readable.left_out[0]
    whole = ArrayImages("set", pixels, np.arange(40) % 2, ["a", "b"])
    assert drop_unreadable(whole) is whole


def options(data: Path, out: Path) -> list[object]:
    return ["--data", data, "--out", out, "--size", 32, "--epochs", 1, "--batch-size", 8,
            "--device", "cpu", "--workers", 1]  # fmt: skip


def test_the_command_line_says_error_or_drop(
    scripts: Scripts, photographs: Path, tmp_path: Path
) -> None:
    data = split(photographs, tmp_path / "data")
    assert DataOptions().unreadable == "error"
    ended = scripts("train", *options(data, tmp_path / "a"))
    assert ended.code == 2 and "02.jpg: got an unreadable image" in ended.err
    ended = scripts("train", *options(data, tmp_path / "b"), "--unreadable", "drop")
    assert ended.code == 0
    line = next(one for one in ended.err.splitlines() if one.startswith("left out"))
    assert line.startswith("left out 1 unreadable of 34 images of train: ") and "02.jpg" in line
    told = json.loads((tmp_path / "b" / "run.json").read_text())
    assert len(told["left_out"]) == 1 and "02.jpg" in told["left_out"][0]
    notes = [json.loads(text) for text in (tmp_path / "b" / "metrics.jsonl").open()]
    assert line in [one.get("text") for one in notes]
    assert sum(one.get("retain_read", 0) for one in notes) == 33
    ended = scripts("evaluate", "--data", data, "--original", tmp_path / "b", "--forget", "class:1",
                    "--out", tmp_path / "c", "--unreadable", "drop", "--device", "cpu")  # fmt: skip
    assert ended.code == 0 and "images of test: " in ended.err
    told = json.loads((tmp_path / "c" / "evaluation.json").read_text())["left_out"]
    assert {key: len(lines) for key, lines in told.items()} == {"train": 1, "test": 1}
    on_ranks(2, script_on, "train", *options(data, tmp_path / "d"), "--unreadable", "drop")
    both = [json.loads((tmp_path / k / "run.json").read_text()) for k in "bd"]
    assert both[0]["left_out"] == both[1]["left_out"] and both[0]["data"] == both[1]["data"]
