"""Sets as they are downloaded: archives of every make, and labels that stand in text files."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torchvision
from scipy.io import savemat

from letheon.errors import InputError
from letheon.loaders.open import open_data, open_domains, open_source
from tests.loaders.test_folders import SPLITS, packed

Drawn = Callable[..., Path]
WNIDS = ("n01440764", "n01443537", "n02084071")


def tar(files: Sequence[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


# ------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "w", "zip"])
@pytest.mark.parametrize("suffix", ["tar", "tgz", "zip", "bin"])
def test_an_archive_is_known_by_content(draw: Drawn, mode: str, suffix: str) -> None:
    root = draw(SPLITS)
    path = root.with_name(f"odd.{suffix}")
    if mode == "zip":
        packed(root, "zip").rename(path)
    else:
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            archive.add(root, "./")
    assert open_data(str(path)).train.digest == open_data(str(root)).train.digest


def test_other_archives_are_called_by_name(tmp_path: Path) -> None:
    for start, what in ((b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a\x07", "RAR")):
        (tmp_path / "set.zip").write_bytes(start + bytes(600))
        with pytest.raises(InputError, match=f"which is a {what} archive, expected.*unpack"):
            open_data(str(tmp_path / "set.zip"))


def test_a_zip_of_windows_has_backslashes(draw: Drawn) -> None:
    root = draw(SPLITS)
    with zipfile.ZipFile(root.with_name("win.zip"), "w") as archive:
        for file in root.rglob("*"):
            name = str(file.relative_to(root)).replace("/", "\\")
            data = b"" if file.is_dir() else file.read_bytes()
            archive.writestr(zipfile.ZipInfo(name + "\\" * file.is_dir()), data)
    data = open_data(str(root.with_name("win.zip")))
    assert data.train.digest == open_data(str(root)).train.digest
    assert np.array_equal(data.train.read(4), open_data(str(root)).train.read(4))
    with zipfile.ZipFile(root.with_name("bad.zip"), "w") as archive:
        archive.writestr(zipfile.ZipInfo("C:\\train\\a.jpg"), b"x")
    with pytest.raises(InputError, match="leads outside"):
        open_data(str(root.with_name("bad.zip")))


def with_rubbish(draw: Drawn) -> Path:
    """A set with what macOS and a network storage put beside images: 18 + 9 + 1 files."""
    root = draw(SPLITS)
    for file in list(root.rglob("*.JPEG")):
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7" + bytes(120))
    for file in list((root / "train").rglob("n*/[0-9].JPEG")):
        small = file.parent / "@eaDir" / file.name
        small.parent.mkdir(exist_ok=True)
        small.write_bytes(file.read_bytes())
    (root / "train/n01440764/x.heic").write_bytes(b"x")
    (root / ".cache/train/x").mkdir(parents=True)
    (root / ".cache/train/x/0.png").write_bytes(b"x")
    return root


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_what_is_no_image_is_not_read_and_counted(draw: Drawn, kind: str) -> None:
    root = with_rubbish(draw)
    data = open_data(str(root if kind == "folder" else packed(root, kind, "set/")))
    assert (len(data.train), len(data.test)) == (9, 9)
    (note,) = data.notes
    assert "28 files that look like images are not read" in note
    assert data.train.notes == data.notes


def test_a_clean_set_has_no_note(draw: Drawn) -> None:
    root = draw(SPLITS)
    (root / "readme.txt").write_text("x")
    assert open_data(str(root)).notes == ()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_links_in_an_archive_are_followed_or_counted(draw: Drawn, kind: str) -> None:
    root = draw([*SPLITS, "elsewhere/9.JPEG"])
    path = root.with_name(f"linked.{kind}")
    links = {"train/n01440764/9.JPEG": "../../elsewhere/9.JPEG", "val/n01440764/9.JPEG": "/x.JPEG"}
    files = [file for file in root.rglob("*.JPEG")]
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name, target in links.items():
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                archive.addfile(entry)
            for file in files:
                archive.add(file, str(file.relative_to(root)))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, target in links.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o120777 << 16
                archive.writestr(info, target)
            for file in files:
                archive.write(file, str(file.relative_to(root)))
    data = open_data(str(path))
    assert (len(data.train), len(data.test)) == (10, 9)
    assert data.train.read(3).shape == (12, 10, 3)
    # The link that leads nowhere, and the linked file where it lies itself.
    assert any("2 files that look like images are not read" in note for note in data.notes)


def test_one_name_in_two_unicode_forms_is_counted(draw: Drawn) -> None:
    names = ("caf\u00e9/1.jpg", "cafe\u0301/1.jpg")
    data = open_data(str(draw([f"{s}/{n}" for s in ("train", "val") for n in names])))
    assert len(data.train) == 1 and "2 files" in data.notes[0]


def test_suffixes_of_the_same_formats_are_read(draw: Drawn) -> None:
    rare = [f"train/a/{n}" for n in ("x.jfif", "x.JPE", "x.pgm", "x.avif")]
    data = open_data(str(draw([*rare, "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"])))
    assert len(data.train) == 5 or "1 files" in data.notes[0]


# ------------------------------------------------------------------------------- class folders


def test_sample_numbers_are_those_of_torchvision(draw: Drawn) -> None:
    classes = ("cat", "cat-2", "cat tail", "Dog", "caf\u00e9")
    files = ("0.jpg", "B.jpg", "a.jpg", "sub/1.jpg", "sub-2/1.jpg", "sub/x/1.jpg")
    root = draw([f"{s}/{c}/{f}" for s in ("train", "val") for c in classes for f in files])
    train = open_data(str(root)).train
    theirs = torchvision.datasets.ImageFolder(str(root / "train"))
    expected = [os.path.relpath(path, root) for path, _ in theirs.samples]
    assert [train.file(i) for i in range(len(train))] == expected  # type: ignore[attr-defined]
    assert train.labels.tolist() == theirs.targets and train.classes == tuple(theirs.classes)


def test_numbered_folders_are_in_the_order_of_numbers_and_it_is_said(draw: Drawn) -> None:
    data = open_data(str(draw([f"{s}/{c}/0.jpg" for s in ("train", "val") for c in range(12)])))
    assert data.classes == data.test.classes == tuple(map(str, range(12)))
    files = [data.train.path(i).split("/")[-2] for i in range(12)]
    assert [data.classes[label] for label in data.train.labels] == files == sorted(files)
    assert "order of the numbers" in data.notes[0] and "classes" in data.notes[0]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("training", "validation"),
        ("Train", "Test"),
        ("TRAIN", "dev"),
        ("train_set", "test_set"),
        ("training_set/training_set", "test_set/test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train_images", "val_images"),
        ("train", "eval"),
    ],
)
def test_splits_under_any_usual_name(draw: Drawn, train: str, held_out: str) -> None:
    data = open_data(
        str(draw([f"{s}/{c}/{i}.jpg" for s in (train, held_out) for c in "ab" for i in "12"]))
    )
    assert (len(data.train), len(data.test)) == (4, 4) and data.classes == ("a", "b")
    assert f"/{train}/" in data.train.path(0) and f"/{held_out}/" in data.test.path(0)


def test_a_class_called_train_is_no_split(draw: Drawn) -> None:
    domains = open_domains(str(draw([f"real/{c}/{i}.jpg" for c in ("train", "bus") for i in "12"])))
    assert domains["real"].classes == ("bus", "train")


# --------------------------------------------------------------------------- labels in text files


def test_tiny_imagenet(draw: Drawn) -> None:
    paths = [f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(4)]
    paths += [f"{s}/images/{s}_{i}.JPEG" for s in ("val", "test") for i in range(6)]
    root = draw(paths, "tiny-imagenet-200")
    lines = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t62\t62\n" for i in range(6)]
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    for path in (root, packed(root, "zip", "tiny-imagenet-200/")):
        data = open_data(str(path))
        assert len(data.train) == 12 and data.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert data.names[1][:2] == ("n01443537", "goldfish")
        assert any("6 files that look like images are not read" in note for note in data.notes)


def kaggle(draw: Drawn) -> Path:
    base = "ILSVRC/Data/CLS-LOC"
    paths = [f"{base}/train/{w}/{w}_{i}.JPEG" for w in WNIDS for i in range(4)]
    paths += [f"{base}/val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)]
    return draw([*paths, *(f"{base}/test/ILSVRC2012_test_{i:08d}.JPEG" for i in range(1, 4))])


def test_kaggles_imagenet(draw: Drawn) -> None:
    root = kaggle(draw)
    with pytest.raises(InputError, match=r"outside class folders and no table.*LOC_val_solution"):
        open_data(str(root))
    rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[i % 3]} 1 2 3 4 \n" for i in range(6, 0, -1)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))
    names = "".join(f"{w} a name, another\n" for w in WNIDS)
    (root / "LOC_synset_mapping.txt").write_text(names)
    (root / "ILSVRC/ImageSets/CLS-LOC").mkdir(parents=True)
    sets = "".join(f"ILSVRC2012_val_{i:08d} {i}\n" for i in range(1, 7))
    (root / "ILSVRC/ImageSets/CLS-LOC/val.txt").write_text(sets)
    data = open_data(str(root))
    assert len(data.train) == 12 and data.test.labels.tolist() == [1, 2, 0, 1, 2, 0]
    assert data.names[0] == (WNIDS[0], "a name", "another")


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_in_a_table_are_those_of_the_sorted_classes(draw: Drawn, first: int) -> None:
    root = kaggle(draw) / "ILSVRC/Data/CLS-LOC"
    lines = [f"ILSVRC2012_val_{i:08d}.JPEG {i % 3 + first}\n" for i in range(1, 7)]
    (root / "val.txt").write_text("".join(lines))
    assert open_data(str(root)).test.labels.tolist() == [1, 2, 0, 1, 2, 0]


def test_the_digest_of_a_listed_split_holds_its_labels(draw: Drawn) -> None:
    root = kaggle(draw) / "ILSVRC/Data/CLS-LOC"
    digests = set()
    for shift in (0, 1):
        lines = [f"ILSVRC2012_val_{i:08d}.JPEG {(i + shift) % 3}\n" for i in range(1, 7)]
        (root / "val.txt").write_text("".join(lines))
        digests.add(open_data(str(root)).test.digest)
    assert len(digests) == 2


def test_official_imagenet_tars(draw: Drawn, tmp_path: Path) -> None:
    root = draw([f"{i}.JPEG" for i in range(9)], "drawn")
    pictures = [(root / f"{i}.JPEG").read_bytes() for i in range(9)]
    out = tmp_path / "official"
    out.mkdir()
    inner = [
        (f"{w}.tar", tar([(f"{w}_{i}.JPEG", pictures[3 * k + i]) for i in range(3)]))
        for k, w in enumerate(WNIDS)
    ]
    (out / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    (alone,) = open_source(str(out / "ILSVRC2012_img_train.tar")).values()  # type: ignore[union-attr]
    assert alone.classes == WNIDS and alone.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    val = [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", pictures[8 - i]) for i in range(6)]
    (out / "ILSVRC2012_img_val.tar").write_bytes(tar(val))
    with pytest.raises(InputError, match="development kit"):
        open_data(str(out))
    ids = [(2, WNIDS[0], 0), (3, WNIDS[1], 0), (1, WNIDS[2], 0), (4, "n00000001", 3)]
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array([(i, w, n) for i, w, n in ids], dtype=kinds)})
    truth = b"".join(b"%d\n" % number for number in (1, 2, 3, 3, 1, 2))
    kit = "ILSVRC2012_devkit_t12/data/"
    files = [
        (f"{kit}meta.mat", meta.getvalue()),
        (f"{kit}ILSVRC2012_validation_ground_truth.txt", truth),
    ]
    with tarfile.open(out / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    both = open_data(str(out))
    assert both.classes == WNIDS and both.test.labels.tolist() == [2, 0, 1, 1, 2, 0]
    assert np.array_equal(both.train.read(4), open_data(str(root_of(draw, root, 4))).train.read(0))


def root_of(draw: Drawn, root: Path, number: int) -> Path:
    """A flat folder with that one picture."""
    out = root.with_name("one")
    out.mkdir()
    (out / "n01440764_0.JPEG").write_bytes((root / f"{number}.JPEG").read_bytes())
    return out


@pytest.mark.parametrize(
    "name", ["ILSVRC2012_val_{i:08d}_{w}.JPEG", "{w}_{i}.JPEG", "{w}_{i}_{w}.JPEG"]
)
def test_wordnet_ids_in_flat_names(draw: Drawn, name: str) -> None:
    paths = [name.format(i=i + 1, w=WNIDS[i % 3]) for i in range(6)]
    data = open_data(str(draw(paths)))
    expected = [WNIDS.index(w) for path in sorted(paths) for w in WNIDS if w in path]
    assert data.train.labels.tolist() == expected and data.classes == WNIDS
    assert data.names[0] == (WNIDS[0], "tench")


def test_a_flat_folder_with_a_table(draw: Drawn) -> None:
    root = draw([f"{i}.png" for i in range(6)])
    table = "id,breed\n" + "".join(f"{i},{'pug' if i % 2 else 'basset hound'}\n" for i in range(6))
    (root / "labels.csv").write_text(table)
    data = open_data(str(root))
    assert data.classes == ("basset hound", "pug") and data.train.labels.tolist() == [0, 1] * 3
    (root / "labels.csv").write_text(table.rpartition("5,")[0])
    with pytest.raises(InputError, match=r"0\.png: got an image outside any folder"):
        open_data(str(root))


def cub(draw: Drawn) -> Path:
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
    lines = [(4 * c + i + 1, f"{n}/{n[4:]}_{i}.jpg", c + 1, int(i < 3))
             for c, n in enumerate(names) for i in range(4)]  # fmt: skip
    root = draw([f"images/{file}" for _, file, _, _ in lines], "CUB_200_2011")
    for name, column in (("images", 1), ("image_class_labels", 2), ("train_test_split", 3)):
        text = "".join(f"{line[0]} {line[column]}\n" for line in lines)
        (root / f"{name}.txt").write_text(text)
    (root / "classes.txt").write_text("".join(f"{j + 1} {n}\n" for j, n in enumerate(names)))
    return root


def test_cub_is_a_training_set_by_its_lists_and_a_domain_as_before(draw: Drawn) -> None:
    root = cub(draw)
    data = open_data(str(root))
    assert (len(data.train), len(data.test)) == (9, 3)
    assert data.test.labels.tolist() == [0, 1, 2] and data.test.path(0).endswith("_3.jpg")
    assert data.classes == data.test.classes and data.classes[2] == "003.Sooty_Albatross"
    (domain,) = open_domains(str(root)).values()
    assert len(domain) == 12
    good = (root / "images.txt").read_bytes()
    for broken in (b"1\n", "1 \u00e4\n".encode("latin-1")):
        (root / "images.txt").write_bytes(good + broken)
        with pytest.raises(InputError, match=r"images\.txt: got lines that are not text in two"):
            open_data(str(root))
    (root / "images.txt").write_bytes(good)
    (root / "images/001.Black_footed_Albatross/Black_footed_Albatross_0.jpg").unlink()
    with pytest.raises(InputError, match=r"images\.txt: got 001"):
        open_data(str(root))


def test_lists_of_train_and_test_beside_class_folders(draw: Drawn) -> None:
    root = draw([f"images/{c}/{i}.jpg" for c in ("pie", "soup") for i in range(4)], "food")
    (root / "meta").mkdir()
    for split, numbers in (("train", (3, 0, 2)), ("test", (1,))):
        lines = [f"{c}/{i}\n" for c in ("pie", "soup") for i in numbers]
        (root / f"meta/{split}.txt").write_text("".join(lines))
    data = open_data(str(root))
    assert (len(data.train), len(data.test)) == (6, 2) and data.classes == ("pie", "soup")
    assert data.test.path(1).endswith("soup/1.jpg")
