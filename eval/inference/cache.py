"""Cache outputs on disk under what they were made from: nothing is computed twice or stale.

A folder is named by the digest of its facts (weights, data, preset, precision, taps) and holds one
.npy file a column, read by memory map, so a set may be larger than memory. It appears whole, by a
rename, when every row has been written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from letheon import durable
from letheon.engine.distributed import Ranks, agree, gather_rows
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError, LetheonError
from letheon.eval.inference.column_digests import check_columns, digest_columns
from letheon.eval.inference.extract import (
    InferenceOptions,
    Parts,
    assemble,
    check_complete,
    columns,
    read_answers,
    widths,
)
from letheon.eval.outputs import Outputs
from letheon.folders import lock, lock_holder
from letheon.loaders.batch import Loader
from letheon.loaders.order import share
from letheon.regular import read_text
from letheon.sealed import SEAL, expect_shape, read_json, read_sealed, seal

_FORMAT = 1
_FACTS = "facts.json"
_DIGESTS = "digests"
_IMAGES = "images"  # digest of the images, beside the facts that name the folder
PARTS = ".parts"
"""Ending of the folder of what is saved of outputs on their way."""
_PARTIAL = ".partial-"
_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}

Facts = Mapping[str, Any]
"""What the outputs depend on, as JSON holds it."""


@dataclass(frozen=True)
class Cache:
    """Where the outputs of one model on one set are kept: a wrapper round `extract`."""

    folder: Path  # of all stored outputs, on a file system that all ranks share
    facts: Facts  # digests of the weights, the images with their forget flags, and the preset
    samples: int  # of the whole set
    images: str = ""
    """Digest of the images alone, kept beside the outputs for who looks for them."""

    def extract(
        self,
        model: Classifier,
        loader: Loader,
        ranks: Ranks,
        options: InferenceOptions | None = None,
        parts: Parts | None = None,
    ) -> Outputs:
        """Read the outputs where they are stored; else run the model as `extract` and store them.

        Args:
            model: as in `extract`, as are loader, ranks and options.
            loader: this rank's.
            ranks: the job; every rank must call.
            options: number format, taps, samples, flip and shift are part of what names the folder.
            parts: as in `extract`; only where `is_stored` says no.

        Returns:
            This rank's share, over memory-mapped files. Writing to its tensors does not change
            the files.

        Raises:
            InputError: as `extract`, or a folder that the ranks do not share or cannot be written.
        """
        options = options or InferenceOptions()
        place, full = self._place(ranks, options)
        if parts is not None or not _is_whole(place, ranks):
            parts = parts or read_answers(model, loader, ranks.device, options)
            try:
                _write(place, full, self.images, parts, options, ranks)
            finally:
                parts.close()
        agree(ranks, _problem(lambda: _verify(place, full, ranks)))
        return _read(place, options, ranks)

    def is_stored(self, ranks: Ranks, options: InferenceOptions) -> bool:
        """Tell whether `extract` would run no network; every rank must call, and gets the same."""
        return _is_whole(self._place(ranks, options)[0], ranks)

    def parts_folder(self, ranks: Ranks, options: InferenceOptions) -> Path:
        """Return where the ranks keep parts of the outputs while they are made."""
        place = self._place(ranks, options)[0]
        return place.with_name(place.name + PARTS)

    def _place(self, ranks: Ranks, options: InferenceOptions) -> tuple[Path, dict[str, Any]]:
        """Find where the outputs are kept, and all the facts that name the place."""
        dtype = options.precision.resolve(ranks.device).dtype
        full: dict[str, Any] = {**self.facts, "format": _FORMAT, "samples": self.samples}
        full |= {"taps": list(options.taps), "dtype": dtype, "device": ranks.device.type}
        full |= {"indices": _digest(options.unique_indices)}
        full |= {"flip": True} if options.flip else {}
        full |= {"shift": True} if options.shift else {}
        return self.folder / _digest(full)[:32], full


def _is_whole(place: Path, ranks: Ranks) -> bool:
    return bool(gather_rows(torch.tensor([place.joinpath(_FACTS).is_file()]), ranks).all())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file(column: str) -> str:
    return column.replace(" ", "-") + ".npy"


def _write(
    place: Path,
    facts: Facts,
    images: str,
    parts: Parts,
    options: InferenceOptions,
    ranks: Ranks,
) -> None:
    """Each rank writes its rows in place; rank 0 makes the files and gives them their name."""
    indices, taps = options.unique_indices, options.taps
    token = gather_rows(torch.tensor([secrets.randbits(62)]), ranks)[0]  # rank 0's
    partial = place.with_name(f"{place.name}{_PARTIAL}{int(token):x}")
    rows = facts["samples"] if indices is None else len(indices)
    first: list[dict[str, Tensor]] = []
    with ExitStack() as stack:
        agree(ranks, _problem(lambda: first.extend(itertools.islice(parts, 1))))
        wide = widths(first[0] if first else None, taps, ranks)

        def begin() -> None:
            place.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(place)
            stack.enter_context(lock(partial))
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            _create(partial, rows, wide, taps)
            durable.write(partial / _IMAGES, images)

        agree(ranks, _problem(begin, ranks.main))
        agree(ranks, _problem(lambda: _fill(partial, itertools.chain(first, parts), indices)))
        known = {**facts, _IMAGES: images} if images else facts
        agree(ranks, _problem(lambda: _publish(partial, place, known, indices), ranks.main))
    if ranks.main:
        shutil.rmtree(place.with_name(place.name + PARTS), ignore_errors=True)


def _remove_leftovers(place: Path) -> None:
    """Remove what a process that died while it stored the same outputs has left."""
    begin = f"{place.name}{_PARTIAL}"
    locks = [path.name[1:].removesuffix(".lock") for path in place.parent.glob(f".{begin}*.lock")]
    folders = [path.name for path in place.parent.glob(f"{begin}*")]
    handle = os.open(place.parent, os.O_RDONLY)
    try:
        for name in {*locks, *folders}:
            if not lock_holder(name, handle):
                shutil.rmtree(place.with_name(name), ignore_errors=True)
                place.with_name(f".{name}.lock").unlink(missing_ok=True)
    finally:
        os.close(handle)


def _problem(work: Callable[[], object], mine: bool = True) -> str | None:
    """Do the work where it is this rank's, and say what went wrong, for `agree`."""
    try:
        if mine:
            work()
    except LetheonError as error:
        return str(error)
    except OSError as error:
        return f"got {error} while outputs were stored; free space there or name another folder"
    return None


def _create(folder: Path, rows: int, wide: Mapping[str, int], taps: Sequence[str]) -> None:
    """Empty files of their full size, so that a full disk shows here and not in the middle."""
    folder.mkdir(parents=True)
    for name, dtype in columns(taps).items():
        shape = (rows, wide[name]) if name in wide else (rows,)
        numbers = np.lib.format.open_memmap(folder / _file(name), "w+", _NUMPY[dtype], shape)
        if numbers.size:
            with (folder / _file(name)).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END))


def _fill(folder: Path, parts: Iterable[dict[str, Tensor]], indices: Sequence[int] | None) -> None:
    rows = None if indices is None else torch.tensor(indices, dtype=torch.int64)
    for part in parts:
        places = part["index"] if rows is None else torch.searchsorted(rows, part["index"])
        for name, values in part.items():
            try:
                numbers = np.load(folder / _file(name), mmap_mode="r+")
            except FileNotFoundError:
                raise InputError(
                    f"got outputs folder {folder.parent}, which the ranks do not share; "
                    "name one on a file system that all of them see"
                ) from None
            numbers[places.numpy()] = values.numpy()
            numbers.flush()


def _publish(partial: Path, place: Path, facts: Facts, indices: Sequence[int] | None) -> None:
    index = np.array(np.load(partial / _file("index"), mmap_mode="r"))
    expected = np.arange(len(index)) if indices is None else np.asarray(indices)
    assert np.array_equal(index, expected), "a sweep left samples out, or gave some twice"
    digests = digest_columns(partial, sorted(path.name for path in partial.glob("*.npy")))
    (partial / _IMAGES).unlink()
    durable.write(partial / _FACTS, seal({**facts, _DIGESTS: digests}))
    try:
        partial.rename(place)
        durable.flush(place.parent)
    except OSError:
        if not place.joinpath(_FACTS).is_file():  # else another job has stored the same meanwhile
            raise


def _verify(place: Path, facts: Facts, ranks: Ranks) -> None:
    """Compare what is stored with `facts` and with its digests; older outputs have none."""
    stored = read_sealed(place / _FACTS)
    digests = stored.pop(_DIGESTS, None)
    stored.pop(_IMAGES, None)
    sealed = stored.pop(SEAL, None) is not None
    if stored != json.loads(json.dumps(facts)) or sealed != (digests is not None):
        raise InputError(
            f"got the stored outputs {place}, which were made from something else than their name "
            "says; expected the same; remove that folder, and they are made again"
        )
    if digests is None and ranks.main:
        print(f"{place}: stored without digests, so they are not verified", file=sys.stderr)
    with expect_shape(place / _FACTS):
        check_columns(place, digests or {}, ranks)


def _read(place: Path, options: InferenceOptions, ranks: Ranks) -> Outputs:
    own = {}
    for name in columns(options.taps):
        # "c": what is written to the tensors stays in memory.
        whole = np.load(place / _file(name), mmap_mode="c")
        own[name] = torch.from_numpy(whole[share(len(whole), ranks.rank, ranks.world)])
    outputs = assemble(own, options.taps, ranks)
    check_complete(outputs, options.unique_indices)
    return outputs


def stored_outputs(folder: Path, images: str) -> list[Path]:
    """List the outputs in `folder` that were made on the images of this digest, whole or not."""
    return [place for place in _places(folder) if images and _images_of(place) == images]


def outputs_of_unknown_images(folder: Path) -> list[Path]:
    """List the outputs in `folder` that do not say of which images they are, such as older ones."""
    return [place for place in _places(folder) if not _images_of(place)]


def _places(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{'[0-9a-f]' * 32}*"))


def _images_of(place: Path) -> str:
    """The digest of the images that some outputs were made on; empty where it is not said."""
    parts = place.name.endswith(PARTS)
    said = map(_read_images, sorted(place.glob("*/*.json")) if parts else [place])
    return next(filter(None, said), "")


def _read_images(place: Path) -> str:
    """As `_images_of`, of a part's file or of the folder of outputs."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        if place.name.endswith(".json"):
            return str(read_json(place)["origin"][_IMAGES])
        if _PARTIAL in place.name:
            return read_text(place / _IMAGES)
        return str(read_json(place / _FACTS)[_IMAGES])
    return ""
