"""The table of data layouts in docs/bring-your-own.md: a maker for each row, which is then read."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from letheon.loaders.datasets.image_set import Data
from letheon.loaders.open import open_data, open_source
from letheon.loaders.views import align_labels, model_classes
from tests.loaders.test_cifar_python import CLASSES, batch
from tests.loaders.test_downloads import WNIDS, cub, kaggle, tar
from tests.loaders.test_ffcv_files import write as write_ffcv
from tests.loaders.test_folders import cifar10
from tests.loaders.test_shards import CLASS_LABEL, FORMS, info, png, save_to_disk, table
from tests.loaders.test_shards import write_shards as write_webdataset

DOC = Path(__file__).resolve().parents[2] / "docs" / "bring-your-own.md"
Drawn = Callable[..., Path]
Maker = Callable[[Drawn, Path], Path]
BOTH = ("train", "val")


def class_folders(*names: str) -> list[str]:
    return [f"{name}/{i}.JPEG" for name in names for i in range(3)]


def with_text(root: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_csv", ".csv").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def imagenet_tars(draw: Drawn, tmp_path: Path) -> Path:
    inner = [(f"{w}.tar", tar([(f"{w}_{i}.JPEG", png(i)) for i in range(3)])) for w in WNIDS]
    root = tmp_path / "official"
    root.mkdir()
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    val = [(f"ILSVRC2012_val_{i:08d}.JPEG", png(i)) for i in range(6)]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(val))
    return with_text(root, val_txt="".join(f"{n} {i % 3}\n" for i, (n, _) in enumerate(val)))


def kaggles(draw: Drawn, tmp_path: Path) -> Path:
    rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[i % 3]} 1 2 3 4\n" for i in range(1, 7)]
    text = "ImageId,PredictionString\n" + "".join(rows)
    return with_text(kaggle(draw), LOC_val_solution_csv=text)


def tiny(draw: Drawn, tmp_path: Path) -> Path:
    paths = [f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(4)]
    root = draw([*paths, *(f"val/images/val_{i}.JPEG" for i in range(6))])
    lines = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t6\t6\n" for i in range(6)]
    return with_text(root, val__val_annotations_txt="".join(lines))


def python_cifar(draw: Drawn, tmp_path: Path) -> Path:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (root / name).write_bytes(pickle.dumps(batch(k), 2))
    names = {b"label_names": [name.encode() for name in CLASSES]}
    (root / "batches.meta").write_bytes(pickle.dumps(names, 2))
    return root


def binary_cifar(draw: Drawn, tmp_path: Path) -> Path:
    cifar10(tmp_path / "binary")
    return tmp_path / "binary"


def food(draw: Drawn, tmp_path: Path) -> Path:
    root = draw([f"images/{c}/{i}.jpg" for c in ("pie", "soup") for i in range(4)])
    texts = {
        f"meta__{split}_txt": "".join(f"{c}/{i}\n" for c in ("pie", "soup") for i in numbers)
        for split, numbers in (("train", (0, 1, 2)), ("test", (3,)))
    }
    return with_text(root, **texts)


def domainnet(draw: Drawn, tmp_path: Path) -> Path:
    root = draw([f"{d}/{c}/{i}.jpg" for d in ("real", "clipart") for c in "ab" for i in range(3)])
    for domain in ("real", "clipart"):
        lines = [f"{domain}/{c}/{i}.jpg {k}\n" for k, c in enumerate("ab") for i in range(3)]
        (root / f"{domain}_list.txt").write_text("".join(lines))
    return root


def shards(draw: Drawn, tmp_path: Path) -> Path:
    names = {"train-000000": range(6), "test-000000": range(6, 9)}
    return write_webdataset(tmp_path / "shards", names, FORMS["cls"])


def on_disk(draw: Drawn, tmp_path: Path) -> Path:
    for split, numbers in (("train", range(9)), ("test", range(9, 12))):
        rows = table(numbers, info(CLASS_LABEL))
        save_to_disk(tmp_path / "hub" / split, rows, info(CLASS_LABEL))
    return with_text(tmp_path / "hub", **{"dataset_dict.json": '{"splits": ["train", "test"]}'})


def parquet(draw: Drawn, tmp_path: Path) -> Path:
    pq = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "hub/data").mkdir(parents=True)
    for split, numbers in (("train", range(9)), ("test", range(9, 12))):
        file = tmp_path / f"hub/data/{split}-00000-of-00001.parquet"
        pq.write_table(table(numbers, info(CLASS_LABEL)), file)
    return tmp_path / "hub"


def ffcv(draw: Drawn, tmp_path: Path) -> Path:
    root = tmp_path / "ffcv"
    root.mkdir()
    for split in BOTH:
        fields = [("image", "image"), ("label", "int")]
        write_ffcv(root / f"{split}_500_0.50_90.ffcv", fields, 6, "proportion")
    return root


def flat_split(draw: Drawn, tmp_path: Path) -> Path:
    root = draw([*class_folders("train/a", "train/b"), *(f"val/{i}.png" for i in range(4))])
    return with_text(root, val_txt="".join(f"{i}.png {'ab'[i % 2]}\n" for i in range(4)))


def flat_folder(draw: Drawn, tmp_path: Path) -> Path:
    rows = "".join(f"{i},{'pug' if i % 2 else 'basset'}\n" for i in range(6))
    return with_text(draw([f"{i}.png" for i in range(6)]), labels_csv=f"id,breed\n{rows}")


def train_tar(draw: Drawn, tmp_path: Path) -> Path:
    return imagenet_tars(draw, tmp_path) / "ILSVRC2012_img_train.tar"


MAKERS: dict[str, tuple[Maker, int, int]] = {  # row: maker, images of train or all, of test
    "ImageNet in class folders": (
        lambda draw, _: draw(class_folders(*(f"{s}/{w}" for s in BOTH for w in WNIDS))), 9, 9,
    ),
    "ImageNet's official tars": (imagenet_tars, 9, 6),
    "`ILSVRC2012_img_train.tar` alone": (train_tar, 9, 0),
    "Kaggle's ImageNet": (kaggles, 12, 6),
    "Hugging Face's ImageNet": (
        lambda draw, _: draw([f"{w}_{i}_{w}.JPEG" for w in WNIDS for i in range(2)]), 6, 6,
    ),
    "Tiny-ImageNet-200": (tiny, 12, 6),
    "any flat split": (flat_split, 6, 4),
    "a flat folder": (flat_folder, 6, 6),
    "splits by another name": (
        lambda draw, _: draw(class_folders("training/a", "training/b", "dev/a", "dev/b")), 6, 6,
    ),
    "CIFAR-10, CIFAR-100, binary": (binary_cifar, 20, 4),
    "CIFAR-10, CIFAR-100, Python": (python_cifar, 100, 20),
    "CUB-200-2011": (lambda draw, _: cub(draw), 9, 3),
    "Food-101 and its like": (food, 6, 2),
    "Office-Home": (
        lambda draw, _: draw(class_folders("Art/Bed", "Art/Pen", "Real World/Bed")), 9, 0,
    ),
    "DomainNet, DomainNet-126": (domainnet, 12, 0),
    "one folder of classes": (lambda draw, _: draw(class_folders("cat", "dog")), 6, 0),
    "WebDataset shards": (shards, 6, 3),
    "Hugging Face dataset, saved to disk": (on_disk, 9, 3),
    "Hugging Face dataset, parquet": (parquet, 9, 3),
    "ffcv files of others": (ffcv, 6, 6),
    "folders named by number": (
        lambda draw, _: draw(class_folders(*(f"{s}/{c}" for s in BOTH for c in range(12)))), 36, 36,
    ),
    "folders named by ImageNet's words": (
        lambda draw, _: draw(class_folders(*(f"{s}/{c}" for s in BOTH for c in ("tench", "ox")))),
        6, 6,
    ),
}  # fmt: skip


def rows() -> list[str]:
    part = DOC.read_text(encoding="utf-8").partition("## Data layouts")[2]
    found = re.findall(r"^\| ([^|]+?) \|", part, re.M)[1:]
    return [row for row in found if not row.startswith("-")]


def test_every_row_has_a_maker_and_every_maker_a_row() -> None:
    assert sorted(rows()) == sorted(MAKERS)


@pytest.mark.parametrize("row", rows())
def test_a_row_is_read(draw: Drawn, tmp_path: Path, row: str) -> None:
    maker, train, test = MAKERS[row]
    path = maker(draw, tmp_path)
    data = open_data(str(path)) if test else open_source(str(path))
    sets = [data.train, data.test] if isinstance(data, Data) else list(data.values())
    if test:
        assert (len(sets[0]), len(sets[1])) == (train, test)
    else:
        assert sum(map(len, sets)) == train
    for images in sets:
        assert images.read(len(images) - 1).shape[2] == 3
        assert set(images.labels.tolist()) <= set(range(len(images.classes)))
    if row == "folders named by number":
        assert sets[0].classes == tuple(map(str, range(12)))
    if row == "folders named by ImageNet's words" and isinstance(data, Data):
        aligned = align_labels(data, model_classes(None, 1000, data.classes))
        assert set(aligned.train.labels.tolist()) == {0, 345}
