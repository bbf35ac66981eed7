"""Writing `.beton` files: several processes, resumable, the same bytes whatever their number.

Chunks of images are checked and encoded into parts beside the result (`parts`); the parts are then
joined in the order of the source. A run that was stopped goes on with the parts that are there. The
disk must hold the result twice while it is joined.
"""

from __future__ import annotations

import csv
import hashlib
import io
import mmap
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from letheon.durable import replacing, write
from letheon.errors import InputError, RunFailed, UnreadableImage
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.formats import beton
from letheon.loaders.formats.beton import FORMAT, BetonImages
from letheon.loaders.formats.encoding import Encoding, admit
from letheon.loaders.formats.parts import Parts, run_chunks
from letheon.loaders.formats.pieces import BYTES
from letheon.progress import Line
from letheon.sealed import seal

ROW = np.dtype([("f0", beton.IMAGE), ("f1", "<i8"), ("f2", "<i8")], align=True)
LISTED = ("index", "path", "label", "mode", "height", "width", "bytes", "sha256", "remarks")
FIELDS = (("image", beton.IMAGE_FIELD), ("label", beton.INT_FIELD), ("index", beton.INT_FIELD))


@dataclass(frozen=True)
class BetonReport:
    """What `write_beton` did."""

    path: Path
    samples: int
    counts: dict[str, int]  # "passed through", "encoded", "raw", "CMYK converted", ...
    quarantined: tuple[tuple[str, str], ...]  # file, reason


def write_beton(
    images: ImageSet,
    out: Path,
    encoding: Encoding | None = None,
    workers: int = 0,
    again: bool = False,
) -> BetonReport:
    """Write `images` to the `.beton` file `out`, with its manifest and list of samples beside it.

    The fields are image, label and index: the sample's number in `images`, which differs from its
    row where images were left out. With `workers` the encoding is done by that many processes.
    With `again` a file that was written
    from the same images with the same encoding is left as it is.

    Raises:
        InputError: `out` exists or cannot be written, or a class has no readable image.
    """
    encoding = encoding or Encoding()
    settings = {"format": FORMAT, "source": images.digest, "encoding": asdict(encoding)}
    if out.exists():
        there = BetonImages(out).manifest if again else {}
        if settings.items() <= there.items():
            left_out = tuple((bad["path"], bad["reason"]) for bad in there["quarantined"])
            return BetonReport(out, there["samples"], there["counts"], left_out)
        raise InputError(f"got {out}, which exists, expected a new file; remove it or name another")
    try:
        parts = Parts(out.with_name(out.name + ".parts"), settings, len(images))
        missing = parts.missing()
        line = Line(images.name, sum(len(parts.members(k)) for k in missing))
        work = partial(_encode_chunk, images, parts, encoding)
        for k in run_chunks(work, missing, workers):
            line.advance(len(parts.members(k)), len(parts.members(k)))
        line.close()
        written = _join(images, out, parts, settings, encoding.page)
        parts.remove()
    except OSError as error:
        raise InputError(
            f"got {out}, which cannot be written ({error.strerror}), expected a writable place "
            "with room for twice the result; name another"
        ) from None
    return written


def _encode_chunk(images: ImageSet, parts: Parts, encoding: Encoding, chunk: int) -> int:
    """Write the part of a chunk: the blobs in a row, and a line about each."""

    def fill(file: BinaryIO) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        bad: list[tuple[str, str]] = []
        for i in parts.members(chunk):
            try:
                data, height, width, raw, remarks = admit(images, i, encoding)
            except UnreadableImage as error:
                bad.append((images.path(i), str(error).removeprefix(f"{images.path(i)}: ")))
                continue
            file.write(data)
            rows.append(
                {
                    "index": i,
                    "path": images.file(i) if isinstance(images, FileImages) else images.path(i),
                    "label": int(images.labels[i]),
                    "mode": "raw" if raw else "jpg",
                    "height": height,
                    "width": width,
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "remarks": "; ".join(remarks),
                }
            )
        return {"rows": rows, "bad": bad}

    return parts.write(chunk, fill)


def _join(
    images: ImageSet, out: Path, parts: Parts, settings: dict[str, Any], page: int
) -> BetonReport:
    """The parts as one file with its manifest; `out` itself appears last, and whole."""
    table, sizes = np.zeros(len(images), ROW), np.zeros(len(images), np.int64)
    counts: Counter[str] = Counter()
    bad: list[tuple[str, str]] = []
    digest = hashlib.sha256("\n".join(images.classes).encode("utf-8", "surrogateescape"))
    pieces = io.BytesIO()
    n = 0
    with (
        replacing(beton.listing_path(out)) as temporary,
        # File names need not be valid UTF-8.
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        listing = csv.DictWriter(file, LISTED)
        listing.writeheader()
        for part in map(parts.page, range(len(parts))):
            bad += [(path, reason) for path, reason in part["bad"]]
            for row in part["rows"]:
                mode = beton.RAW if row["mode"] == "raw" else beton.JPEG
                table[n] = (mode, row["width"], row["height"], 0), row["label"], row["index"]
                sizes[n] = row["bytes"]
                # The bytes, label and class of every sample: equal for equal contents anywhere.
                digest.update(f"\n{row['label']} {row['mode']} {row['sha256']}".encode())
                pieces.write(bytes.fromhex(row["sha256"])[:BYTES])
                counts.update(row["remarks"].split("; "))
                listing.writerow(row)
                n += 1
    table, sizes = table[:n], sizes[:n]
    lost = np.setdiff1d(images.labels, table["f1"])
    if len(lost):
        raise InputError(
            f"{images.name}: got no readable image of class {images.classes[lost[0]]!r}, expected "
            "at least one; mend or remove it"
        )
    with replacing(out) as temporary:
        with open(temporary, "wb") as whole:
            table_end, pages_end = _write_file(whole, table, sizes, page, parts)
        with (
            open(temporary, "rb") as written,
            mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            sha256 = hashlib.sha256(mapped).hexdigest()
            index = beton.index_digest(mapped, table_end, pages_end)
        manifest = settings | {
            "name": images.name,
            "samples": n,
            "digest": digest.hexdigest(),
            "file": {"bytes": temporary.stat().st_size, "sha256": sha256},
            "index": index,
            "pieces": hashlib.sha256(pieces.getvalue()).hexdigest(),
            "counts": dict(sorted(counts.items())),
            "quarantined": [{"path": path, "reason": reason} for path, reason in bad],
            "classes": images.classes,
        }
        write(beton.digests_path(out), pieces.getvalue())
        write(beton.manifest_path(out), seal(manifest))
    return BetonReport(out, n, dict(sorted(counts.items())), tuple(bad))


def _write_file(
    file: BinaryIO, table: NDArray[Any], sizes: NDArray[np.int64], page: int, parts: Parts
) -> tuple[int, int]:
    """Header, table with the pointers filled in, pages and allocation table, on the disk.

    Returns:
        Where the table ends, and where the pages do.

    Raises:
        RunFailed: a part was damaged since it was made.
    """
    first = beton.HEADER.itemsize + len(FIELDS) * beton.FIELD.itemsize + table.nbytes
    pointers, end = _place_blobs(sizes, -(-first // page) * page, page)
    table["f0"]["pointer"] = pointers
    blobs = np.zeros(len(table), beton.BLOB)
    blobs["sample"], blobs["pointer"], blobs["size"] = np.arange(len(table)), pointers, sizes
    _write_head(file, table, end, page)
    n = 0
    for chunk in range(len(parts)):
        with open(parts.data(chunk), "rb") as encoded:
            for row in parts.page(chunk)["rows"]:
                data = encoded.read(sizes[n])
                if hashlib.sha256(data).hexdigest() != row["sha256"]:
                    raise RunFailed(
                        f"got {parts.data(chunk)}, which is not as it was written; expected a disk "
                        "that keeps files; run the same again, which makes that part anew"
                    )
                file.seek(pointers[n])
                file.write(data)
                n += 1
    file.seek(end)
    file.write(blobs.tobytes())
    return first, end


def _place_blobs(sizes: NDArray[np.int64], start: int, page: int) -> tuple[NDArray[np.int64], int]:
    """Where each blob goes, so that none lies across a page's edge, and where the pages end."""
    pointers = np.empty_like(sizes)
    at = start
    for k, size in enumerate(sizes.tolist()):
        if at % page + size > page:
            at += page - at % page
        pointers[k] = at
        at += size
    return pointers, -(-at // page) * page


def _write_head(file: BinaryIO, table: NDArray[Any], end: int, page: int) -> None:
    head = np.array((beton.VERSION, len(FIELDS), page, len(table), end), beton.HEADER)
    fields = np.zeros(len(FIELDS), beton.FIELD)
    fields["type"] = [kind for _, kind in FIELDS]
    fields["name"] = [name.encode("ascii") for name, _ in FIELDS]
    for part in (head, fields, table):
        file.write(part.tobytes())
