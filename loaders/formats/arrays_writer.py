"""Writing a prepared set: every image read once, the unreadable ones counted and named.

Chunks of images become parts beside the result (`parts`), which are then joined; a run that was
stopped goes on with the parts that are there.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from letheon.durable import replacing, write
from letheon.errors import InputError, RunFailed, UnreadableImage
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ArrayImages, Data, ImageSet
from letheon.loaders.formats.arrays import COLUMNS, FORMAT
from letheon.loaders.formats.parts import Parts, growing, run_chunks
from letheon.loaders.formats.pieces import PIECE, load_array, piece_digest
from letheon.loaders.preset import Preset
from letheon.loaders.transforms.geometry import fit
from letheon.progress import Line
from letheon.sealed import seal
from letheon.spans import span


@dataclass(frozen=True)
class Report:
    """What `prepare` did."""

    counts: dict[str, int]  # readable images of each part
    quarantined: tuple[tuple[str, str], ...]  # file, reason


@span("data")
def prepare(
    source: Data | Mapping[str, ImageSet],
    out: Path,
    size: int | None = None,
    workers: int = 0,
) -> Report:
    """Check every image of `source` once and write the set to `out`, whole or not at all.

    With `size`, images of another size are resized by the shorter side and cut to the central
    square. A run that was stopped goes on with the parts it had (see `growing`).

    Raises:
        InputError: `out` exists or cannot be written, a class has no readable image, or arrays
            are to be prepared without a size.
        RunFailed: the disk is full, or a process was killed.
    """
    parts = dict(source) if isinstance(source, Mapping) else {"train": source.train}
    if isinstance(source, Data) and source.test is not source.train:
        parts["test"] = source.test
    first = next(iter(parts.values()))
    if size is None and not all(isinstance(images, FileImages) for images in parts.values()):
        raise InputError(f"{first.name}: got decoded images and no size, expected one; give a size")
    page: dict[str, Any] = {
        "format": FORMAT,
        "kind": "splits" if isinstance(source, Data) else "domains",
        "source": str(first.tree.root.resolve()) if isinstance(first, FileImages) else None,
        "size": size,
        "classes": first.classes,
        "names": source.names if isinstance(source, Data) else None,
        "notes": source.notes if isinstance(source, Data) else [],
    }
    with growing(out, page) as folder:
        bad: list[tuple[str, str]] = []
        entries = {
            name: _write_part(images, folder / name, size, workers, bad)
            for name, images in parts.items()
        }
        _write_csv(folder / "quarantine.csv", [("file", "reason"), *bad])
        write(folder / "set.json", seal(page | {"parts": entries}))
    return Report({name: entry["count"] for name, entry in entries.items()}, tuple(bad))


def _write_part(
    images: ImageSet,
    folder: Path,
    size: int | None,
    workers: int,
    bad: list[tuple[str, str]],
) -> dict[str, Any]:
    """Write one part of the set; its entry in the set's page."""
    settings = {"format": FORMAT, "source": images.digest, "size": size}
    folder.mkdir(exist_ok=True)
    parts = Parts(folder / "parts", settings, len(images))
    missing = parts.missing()
    line = Line(images.name, sum(len(parts.members(k)) for k in missing))
    for k in run_chunks(partial(_check_chunk, images, parts, size), missing, workers):
        line.advance(len(parts.members(k)), len(parts.members(k)))
    line.close()
    pages = [parts.page(k) for k in range(len(parts))]
    for page in pages:
        bad += [(path, reason) for path, reason in page["bad"]]
    numbers = [row[0] for page in pages for row in page["rows"]]
    labels = images.labels[numbers]
    lost = np.setdiff1d(images.labels, labels)
    if len(lost):
        raise InputError(
            f"{images.name}: got no readable image of class {images.classes[lost[0]]!r}, expected "
            "at least one; mend or remove it"
        )
    entry: dict[str, Any] = {"name": images.name, "count": len(numbers)}
    if size is not None:
        entry |= _join_arrays(images, folder, parts, labels, size)
    else:
        assert isinstance(images, FileImages)
        rows = [
            (images.file(number), int(images.labels[number]), *about)
            for page in pages
            for number, *about in page["rows"]
        ]
        _write_csv(folder / "files.csv", [tuple(COLUMNS), *rows])
        entry["root"] = images.root
        entry["digest"] = hashlib.sha256((folder / "files.csv").read_bytes()).hexdigest()
    parts.remove()
    return entry


def _check_chunk(images: ImageSet, parts: Parts, size: int | None, chunk: int) -> int:
    """Write the part of a chunk: the pixels of its images, or bytes and digest of its files."""
    preset = None if size is None else Preset(size=size, resize="short", resize_to=size)

    def fill(file: BinaryIO) -> dict[str, Any]:
        rows: list[tuple[Any, ...]] = []
        bad: list[tuple[str, str]] = []
        for i in parts.members(chunk):
            try:
                image = images.read(i)
                if preset is not None:
                    file.write(np.ascontiguousarray(fit(image, preset)).tobytes())
                    rows.append((i,))
                else:
                    assert isinstance(images, FileImages)
                    data = images.file_bytes(i)
                    rows.append((i, len(data), hashlib.sha256(data).hexdigest()))
            except UnreadableImage as error:
                bad.append((images.path(i), str(error)))
        return {"rows": rows, "bad": bad}

    return parts.write(chunk, fill)


def _join_arrays(
    images: ImageSet, folder: Path, parts: Parts, labels: np.ndarray[Any, Any], size: int
) -> dict[str, Any]:
    """Write images.npy, its digests and labels.npy; what the set's page says about them.

    Raises:
        RunFailed: a part was damaged since it was made.
    """
    shape = (len(labels), size, size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(folder / "images.npy") as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for k in range(len(parts)):
            data = parts.data(k).read_bytes()
            if hashlib.sha256(data).hexdigest() != parts.page(k)["data"]:
                raise RunFailed(
                    f"got {parts.data(k)}, which is not as it was written; expected a disk that "
                    "keeps files; run the same again, which makes that part anew"
                )
            file.write(data)
    with replacing(folder / "labels.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, labels)
    pixels = load_array(folder / "images.npy")
    rows = max(1, PIECE // (size * size * 3))
    pieces = b"".join(
        piece_digest(np.ascontiguousarray(pixels[start : start + rows]))
        for start in range(0, len(pixels), rows)
    )
    write(folder / "images.digests", pieces)
    return {
        "digest": ArrayImages(images.name, pixels, labels, images.classes).digest,
        "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
        "rows": rows,
        "pieces": hashlib.sha256(pieces).hexdigest(),
    }


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write(path, text.getvalue().encode("utf-8", "surrogateescape"))
