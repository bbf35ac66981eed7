"""Writing a prepared set: one pass over all images, the unreadable ones counted and named."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from letheon.durable import replacing, write
from letheon.errors import InputError
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.formats.arrays import FORMAT, MappedImages
from letheon.loaders.preset import Preset
from letheon.loaders.transforms.geometry import fit
from letheon.spans import span

CHUNK = 64


@dataclass(frozen=True)
class Report:
    """What `prepare` did."""

    counts: dict[str, int]  # readable images of each part
    quarantined: tuple[tuple[str, str], ...]  # file, reason


@dataclass(frozen=True)
class _Check(Dataset[Any]):
    """Item k: for each image of chunk k its pixels (or its file's line), or why it is left out."""

    images: ImageSet
    preset: Preset | None

    def __len__(self) -> int:
        return -(-len(self.images) // CHUNK)

    def __getitem__(self, k: int) -> list[NDArray[np.uint8] | tuple[int, str] | str]:
        stop = min(len(self.images), (k + 1) * CHUNK)
        return [self._one(i) for i in range(k * CHUNK, stop)]

    def _one(self, i: int) -> NDArray[np.uint8] | tuple[int, str] | str:
        try:
            image = self.images.read(i)
        except InputError as error:
            return str(error)
        if self.preset is not None:
            return np.ascontiguousarray(fit(image, self.preset))
        assert isinstance(self.images, FileImages)
        data = self.images.tree.read(self.images.file(i))
        return len(data), hashlib.sha256(data).hexdigest()


@span("data")
def prepare(
    source: Data | Mapping[str, ImageSet],
    out: Path,
    size: int | None = None,
    workers: int = 0,
) -> Report:
    """Check every image of `source` once and write the set to `out`, whole or not at all.

    With `size`, images of another size are resized by the shorter side and cut to the central
    square.

    Raises:
        InputError: `out` exists or cannot be written, a class has no readable image, or arrays
            are to be prepared without a size.
    """
    parts = dict(source) if isinstance(source, Mapping) else {"train": source.train}
    if isinstance(source, Data) and source.test is not source.train:
        parts["test"] = source.test
    first = next(iter(parts.values()))
    if size is None and not all(isinstance(images, FileImages) for images in parts.values()):
        raise InputError(f"{first.name}: got decoded images and no size, expected one; give a size")
    if out.exists():
        raise InputError(
            f"got {out}, which exists, expected a new folder; remove it or name another"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"got {out}, which cannot be written ({error.strerror}), expected a writable place; "
            "name another"
        ) from None
    with replacing(out) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            page: dict[str, Any] = {
                "format": FORMAT,
                "kind": "splits" if isinstance(source, Data) else "domains",
                "source": str(first.tree.root.resolve()) if isinstance(first, FileImages) else None,
                "size": size,
                "classes": first.classes,
                "names": source.names if isinstance(source, Data) else None,
                "notes": source.notes if isinstance(source, Data) else [],
                "parts": {},
            }
            bad: list[tuple[str, str]] = []
            for name, images in parts.items():
                page["parts"][name] = _write_part(images, partial / name, size, workers, bad)
            _write_csv(partial / "quarantine.csv", [("file", "reason"), *bad])
            write(partial / "set.json", json.dumps(page, indent=1) + "\n")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Report({name: part["count"] for name, part in page["parts"].items()}, tuple(bad))


def _write_part(
    images: ImageSet,
    folder: Path,
    size: int | None,
    workers: int,
    bad: list[tuple[str, str]],
) -> dict[str, Any]:
    folder.mkdir()
    preset = None if size is None else Preset(size=size, resize="short", resize_to=size)
    chunks = DataLoader(
        _Check(images, preset), batch_size=None, num_workers=workers, collate_fn=_identity
    )
    kept: list[int] = []
    lines: list[tuple[int, str]] = []
    shape = (len(images), size, size, 3)
    with (
        replacing(folder / "images.npy") as temporary,
        open(temporary, "wb") as file,
        tqdm(total=len(images), desc=images.name, disable=None) as bar,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        if size is not None:
            np.lib.format.write_array_header_1_0(file, header)
        for k, chunk in enumerate(chunks):
            for i, found in enumerate(chunk, start=k * CHUNK):
                if isinstance(found, str):
                    bad.append((images.path(i), found))
                    continue
                kept.append(i)
                if isinstance(found, np.ndarray):
                    file.write(found.tobytes())
                else:
                    lines.append(found)
            bar.update(len(chunk))
        if size is not None:  # numpy leaves room in the header for the true number of rows
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header | {"shape": (len(kept), *shape[1:])})
    labels = images.labels[kept]
    lost = np.setdiff1d(images.labels, labels)
    if len(lost):
        raise InputError(
            f"{images.name}: got no readable image of class {images.classes[lost[0]]!r}, expected "
            "at least one; mend or remove it"
        )
    if size is not None:
        with replacing(folder / "labels.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, labels)
        digest = MappedImages(images.name, folder, images.classes, "").digest
    else:
        (folder / "images.npy").unlink()
        assert isinstance(images, FileImages)
        rows = [
            (images.file(i), int(images.labels[i]), *line)
            for i, line in zip(kept, lines, strict=True)
        ]
        _write_csv(folder / "files.csv", [("path", "label", "bytes", "sha256"), *rows])
        digest = hashlib.sha256((folder / "files.csv").read_bytes()).hexdigest()
    return {"name": images.name, "count": len(kept), "digest": digest}


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _identity(chunk: Any) -> Any:
    return chunk
