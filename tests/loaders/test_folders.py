"""Layouts, as folders and as archives; what is refused and in which words."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from letheon.errors import InputError
from letheon.loaders.open import open_data, open_domains

Drawn = Callable[..., Path]
SPLITS = [
    f"{split}/{wnid}/{i}.JPEG"
    for split in ("train", "val")
    for wnid in ("n01440764", "n03028079", "n02102040")
    for i in range(3)
]


def packed(root: Path, kind: str, inside: str = "") -> Path:
    """The folder as an archive, members in reverse order, below `inside`."""
    out = root.with_name(f"{root.name}.{kind}")
    files = sorted((p for p in root.rglob("*") if p.is_file()), reverse=True)
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            for file in files:
                archive.write(file, f"{inside}{file.relative_to(root)}")
    else:
        mode = "w:gz" if kind == "tar.gz" else "w"
        with tarfile.open(out, mode) as archive:  # type: ignore[call-overload]
            for file in files:
                archive.add(file, f"{inside}{file.relative_to(root)}")
    return out


def test_imagenet_layout(draw: Drawn) -> None:
    root = draw(SPLITS)
    (root / "LOC_synset_mapping.txt").write_text("n03028079 church, church building\n")
    data = open_data(str(root))
    assert data.classes == data.test.classes == ("n01440764", "n02102040", "n03028079")
    assert data.names[2] == ("n03028079", "church", "church building")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.train.path(4).endswith("train/n02102040/1.JPEG")
    assert data.train.read(4).shape == (12, 10, 3)
    files = sorted(path for path in SPLITS if path.startswith("train"))
    lines = "".join(f"{path}\t{(root / path).stat().st_size}\n" for path in files)
    contents = b"".join(hashlib.sha256((root / path).read_bytes()).digest() for path in files)
    assert data.train.digest == hashlib.sha256(lines.encode() + contents).hexdigest()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("inside", ["", "some set/"])
def test_an_archive_is_the_same_set_as_its_folder(draw: Drawn, kind: str, inside: str) -> None:
    root = draw(SPLITS)
    folder, archive = open_data(str(root)), open_data(str(packed(root, kind, inside)))
    for a, b in [(folder.train, archive.train), (folder.test, archive.test)]:
        assert a.digest == b.digest and a.classes == b.classes
        assert np.array_equal(a.labels, b.labels)
        assert all(np.array_equal(a.read(i), b.read(i)) for i in range(len(a)))


@pytest.mark.parametrize("held_out", ["val", "valid", "test"])
def test_any_split_names_and_sorted_files(draw: Drawn, held_out: str) -> None:
    paths = [
        f"{s}/{c}/{i}.jpg" for s in ("train", held_out) for c in ("b", "a-b", "a") for i in "B1"
    ]
    data = open_data(str(draw(paths)))
    assert data.classes == ("a", "a-b", "b")
    files = [data.train.path(i).rpartition("/train/")[2] for i in range(len(data.train))]
    assert files == ["a/1.jpg", "a/B.jpg", "a-b/1.jpg", "a-b/B.jpg", "b/1.jpg", "b/B.jpg"]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_of_several_held_out_splits_one_is_read_and_it_is_said(draw: Drawn) -> None:
    paths = [f"{s}/{c}/0.jpg" for s in ("train", "val", "test") for c in "ab"]
    data = open_data(str(draw(paths)))
    assert data.test.path(0).endswith("test/a/0.jpg") and "val/" in data.notes[0]
    data = open_data(
        str(
            draw(
                ["train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg", "val/b/0.jpg", "test/x.jpg"],
                "other",
            )
        )
    )
    assert data.test.path(0).endswith("val/a/0.jpg") and "test/" in data.notes[0]


@pytest.mark.parametrize("spelled", ["Real World", "Real_World", "RealWorld"])
def test_office_home_layout(draw: Drawn, spelled: str) -> None:
    paths = [f"{d}/{c}/{i}.jpg" for d in ("Art", spelled) for c in ("Mop", "Bed") for i in (1, 2)]
    root = draw(paths)
    (root / "docs").mkdir()
    (root / "docs" / "readme.txt").write_text("not a domain")
    domains = open_domains(str(root))
    assert list(domains) == ["Art", "Real_World"]
    assert domains["Art"].classes == domains["Real_World"].classes == ("Bed", "Mop")
    assert domains["Real_World"].labels.tolist() == [0, 0, 1, 1]
    assert (
        open_domains(str(packed(root, "zip", "OfficeHome/")))["Art"].digest == domains["Art"].digest
    )


def test_two_spellings_of_one_domain_are_refused(draw: Drawn) -> None:
    with pytest.raises(InputError, match="two folders"):
        open_domains(str(draw(["Real World/a/1.jpg", "RealWorld/a/1.jpg"])))


def test_class_folders_alone_are_one_domain(draw: Drawn) -> None:
    root = draw(["images/001.Wren/1.jpg", "images/002.Owl/1.jpg"], "cub")
    (root / "readme.txt").write_text("text")
    domains = open_domains(str(root))
    assert list(domains) == ["images"] and domains["images"].classes == ("001.Wren", "002.Owl")
    with pytest.raises(InputError, match="downstream set cannot be trained"):
        open_data(str(root))
    with pytest.raises(InputError, match="name one of its splits"):
        open_domains(str(draw(SPLITS, "upstream")))


def test_flat_folder_of_wordnet_ids(draw: Drawn) -> None:
    data = open_data(str(draw(["n03028079_church.JPEG", "n01440764_tench.JPEG"])))
    assert data.classes == ("n01440764", "n03028079") and data.train.labels.tolist() == [0, 1]
    assert data.names == (("n01440764", "tench"), ("n03028079", "church"))
    assert data.test is data.train and "nothing is held out" in data.notes[0]
    with pytest.raises(InputError, match=r"plain\.jpg: got an image outside any folder"):
        open_data(str(draw(["plain.jpg"], "plain")))


def test_hidden_and_foreign_files_are_passed_over(draw: Drawn) -> None:
    root = draw([*SPLITS, "train/n01440764/._0.JPEG", ".cache/train/x/0.png"])
    (root / "train/n01440764/Thumbs.db").write_bytes(b"x")
    assert len(open_data(str(root)).train) == 9


def test_names_in_two_unicode_forms_are_one(draw: Drawn) -> None:
    paths = "{0}/cafe\u0301/1.jpg", "{0}/caf\u00e9/1.jpg"
    digests = set()
    for number, path in enumerate(paths):
        data = open_data(str(draw([path.format("train"), path.format("val")], f"form{number}")))
        assert data.classes == ("caf\u00e9",) and data.train.read(0).shape == (12, 10, 3)
        digests.add(data.train.digest)
    assert len(digests) == 1


def test_links_are_followed_but_not_round_in_circles(draw: Drawn) -> None:
    real = draw([p.removeprefix("train/") for p in SPLITS if p.startswith("train")], "elsewhere")
    root = draw([p for p in SPLITS if p.startswith("val")])
    (root / "train").symlink_to(real)
    (real / "n01440764" / "round").symlink_to(real)
    assert len(open_data(str(root)).train) == 9


def test_refusals(draw: Drawn, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_data(str(tmp_path / "nowhere"))
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(InputError, match=r"expected a folder, a \.zip or a \.tar"):
        open_data(str(tmp_path / "notes.md"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="got no image"):
        open_data(str(tmp_path / "bare"))
    root = draw(SPLITS)
    (root / "train" / "empty").mkdir()
    with pytest.raises(InputError, match="empty: got a class folder without images"):
        open_data(str(root))
    (root / "train" / "empty").rmdir()
    draw(["train/n09999999/0.jpg"])
    with pytest.raises(InputError, match="4 classes in train/ and 3 in val/"):
        open_data(str(root))
    draw(["train/loose.jpg"])
    with pytest.raises(InputError, match=r"loose\.jpg: got an image outside the class folders"):
        open_data(str(root))
    with pytest.raises(InputError, match="train/ alone"):
        open_data(str(draw(["train/a/1.jpg", "train/b/1.jpg"], "alone")))


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/outside.jpg", "a\\..\\x.jpg"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_lead_outside_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")
    else:
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(InputError, match="leads outside"):
        open_data(str(path))


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_broken_archives_are_named(draw: Drawn, kind: str) -> None:
    path = packed(draw(SPLITS), kind)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=rf"set\.{kind}.*(broken archive|got no image)"):
        data = open_data(str(path))
        data.train.read(0)


def cifar10(root: Path, records: int = 4) -> np.ndarray:
    """Binaries with random pixels; returns the (6, records, 3073) bytes."""
    root.mkdir()
    raw = np.random.default_rng(0).integers(0, 256, (6, records, 3073), dtype=np.uint8)
    raw[:, :, 0] %= 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, batch in zip(names, raw, strict=True):
        (root / name).write_bytes(batch.tobytes())
    (root / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    return raw


@pytest.mark.parametrize("kind", ["", "tar.gz"])
def test_cifar_binaries(tmp_path: Path, kind: str) -> None:
    raw = cifar10(tmp_path / "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-batches-bin"
    data = open_data(str(packed(path, kind, "cifar-10-batches-bin/") if kind else path))
    assert len(data.train) == 20 and len(data.test) == 4 and data.classes == tuple("abcdefghij")
    assert data.train.labels.tolist() == raw[:5, :, 0].ravel().tolist()
    record = raw[2, 3]  # the twelfth training image
    for channel in range(3):
        plane = record[1 + 1024 * channel :][:1024].reshape(32, 32)
        assert np.array_equal(data.train.read(11)[..., channel], plane)


def test_cifar_faults(tmp_path: Path) -> None:
    cifar10(tmp_path / "cut")
    file = tmp_path / "cut" / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"data_batch_2\.bin: got 12291 bytes"):
        open_data(str(tmp_path / "cut"))
    file.unlink()
    with pytest.raises(InputError, match=r"without data_batch_2\.bin"):
        open_data(str(tmp_path / "cut"))
