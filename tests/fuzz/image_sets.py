"""Good image sets in every layout, whose files the fuzz damages."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(seed: int, size: int = 8) -> np.ndarray[Any, Any]:
    """An image."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(form: str, seed: int = 0) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(noise(seed, 16)).save(file, form)
    return file.getvalue()


def tree(folder: Path, names: list[str]) -> Path:
    """PNG files."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded("PNG", number))
    return folder


NAMES = [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(2)]


def make_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in NAMES:
            archive.writestr(name, encoded("PNG"))


def make_tar(form: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with tarfile.open(folder / "set.tar", form) as archive:  # type: ignore[call-overload]
            for name in NAMES:
                member = tarfile.TarInfo(name)
                member.size = len(encoded("PNG"))
                archive.addfile(member, io.BytesIO(encoded("PNG")))

    return make


def make_lists(folder: Path) -> None:
    tree(folder, [f"real/{c}/{i}.png" for c in "ab" for i in range(2)])
    lines = [f"real/{c}/{i}.png {k}" for k, c in enumerate("ab") for i in range(2)]
    (folder / "real_list.txt").write_text("\n".join(lines) + "\n")


def make_labels(text: str, name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tree(folder, [f"train/{c}/{i}.png" for c in "ab" for i in range(2)])
        tree(folder, [f"val/images/v{i}.png" for i in range(2)])
        (folder / "val" / name).write_text(text)

    return make


def make_cub(folder: Path) -> None:
    names = [f"images/{c}/{i}.png" for c in ("001.a", "002.b") for i in range(2)]
    tree(folder, names)
    lines = [f"{k} {name.removeprefix('images/')}" for k, name in enumerate(names, 1)]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    (folder / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n")


def make_cifar(folder: Path) -> None:
    for name in [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]:
        (folder / name).write_bytes((b"\1" + bytes(3072)) * 2)
    (folder / "batches.meta.txt").write_text("a\nb\n")


def make_pickles(folder: Path) -> None:
    import pickle

    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a", b"b"]}, 2))


def make_shards(extension: str, labels: list[str], names: str = "") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for split in ("train", "val"):
            with tarfile.open(folder / f"{split}-000000.tar", "w") as archive:
                for k, label in enumerate(labels):
                    files = {"png": encoded("PNG", k), extension: label.encode()}
                    for suffix, content in files.items():
                        member = tarfile.TarInfo(f"{k:04}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        if names:
            (folder / "classes.txt").write_text(names)

    return make


def make_arrow(folder: Path) -> None:
    import pyarrow as pa

    images = [{"bytes": encoded("PNG", k), "path": f"{k}.png"} for k in range(4)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    label = {"names": ["a", "b"], "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    table = pa.table({"image": pa.array(images, kind), "label": pa.array([0, 1, 0, 1])})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    for split in ("train", "test"):
        place = folder / "set" / split
        place.mkdir(parents=True)
        with pa.OSFile(str(place / "data.arrow"), "wb") as file, \
                pa.ipc.new_stream(file, table.schema) as stream:  # fmt: skip
            stream.write_table(table)
        (place / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        (place / "dataset_info.json").write_text('{"features": {"label": {}}}')
    (folder / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def make_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    images = [{"bytes": encoded("PNG", k), "path": f"{k}.png"} for k in range(4)]
    table = pa.table({"image": images, "label": ["a", "b", "a", "b"]})
    for split in ("train", "test"):
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=2)
