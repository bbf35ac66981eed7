"""Outputs kept on disk under what they were made from: nothing is computed twice, nothing is stale.

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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks, agree, gather_rows
from letheon.engine.precision import Precision
from letheon.errors import InputError
from letheon.eval.inference.extract import (
    Outputs,
    answers,
    assembled,
    check_complete,
    columns,
    widths,
)
from letheon.loaders.batch import Loader

_FORMAT = 1
_FACTS = "facts.json"
_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}

Facts = Mapping[str, Any]
"""What the outputs depend on, as JSON holds it."""


def extract_stored(
    folder: Path,
    facts: Facts,
    model: nn.Module,
    loader: Loader,
    samples: int,
    ranks: Ranks,
    indices: Sequence[int] | None = None,
    precision: Precision | None = None,
    taps: Sequence[str] = (),
    flip: bool = False,
    made: Generator[dict[str, Tensor], None, None] | None = None,
) -> Outputs:
    """As `extract`, but read from `folder` where it is there, and written there where it is not.

    Args:
        folder: of all stored outputs, on a file system that all ranks share.
        facts: digests of the weights, the images with their forget flags, and the preset; number
            format, taps and indices are added here.
        model: as in `extract`, as are loader, ranks, indices, precision and taps.
        loader: this rank's.
        samples: images of the whole set.
        ranks: the job; every rank must call.
        indices: samples to read; default all.
        precision: default float32.
        taps: names of modules.
        flip: as in `extract`, as is made.
        made: only where `is_stored` says no.

    Returns:
        Outputs over memory-mapped files. Writing to its tensors does not change the files.

    Raises:
        InputError: as `extract`, or a folder that the ranks do not share or cannot be written.
    """
    wanted = None if indices is None else sorted({int(i) for i in indices})
    place, full = _place(folder, facts, samples, ranks, wanted, precision, taps, flip)
    if made is not None or not _here(place, ranks):
        parts = made or answers(model, loader, ranks.device, wanted, precision, taps, flip)
        try:
            _write(place, full, parts, wanted, taps, ranks)
        finally:
            parts.close()
    return _read(place, full, wanted, taps)


def is_stored(
    folder: Path,
    facts: Facts,
    samples: int,
    ranks: Ranks,
    indices: Sequence[int] | None = None,
    precision: Precision | None = None,
    taps: Sequence[str] = (),
    flip: bool = False,
) -> bool:
    """Whether `extract_stored` would run no network; every rank must call, and gets the same."""
    wanted = None if indices is None else sorted({int(i) for i in indices})
    return _here(_place(folder, facts, samples, ranks, wanted, precision, taps, flip)[0], ranks)


def _place(
    folder: Path,
    facts: Facts,
    samples: int,
    ranks: Ranks,
    wanted: Sequence[int] | None,
    precision: Precision | None,
    taps: Sequence[str],
    flip: bool,
) -> tuple[Path, dict[str, Any]]:
    """Where the outputs are kept, and all the facts that name the place."""
    precision = (precision or Precision("fp32")).resolve(ranks.device)
    full: dict[str, Any] = {**facts, "format": _FORMAT, "samples": samples, "taps": list(taps)}
    full |= {"dtype": precision.dtype, "device": ranks.device.type, "indices": _digest(wanted)}
    full |= {"flip": True} if flip else {}
    return folder / _digest(full)[:32], full


def _here(place: Path, ranks: Ranks) -> bool:
    return bool(gather_rows(torch.tensor([place.joinpath(_FACTS).is_file()]), ranks).all())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file(column: str) -> str:
    return column.replace(" ", "-") + ".npy"


def _write(
    place: Path,
    facts: Facts,
    parts: Generator[dict[str, Tensor], None, None],
    wanted: Sequence[int] | None,
    taps: Sequence[str],
    ranks: Ranks,
) -> None:
    """Each rank writes its rows in place; rank 0 makes the files and gives them their name."""
    token = gather_rows(torch.tensor([secrets.randbits(62)]), ranks)[0]  # rank 0's
    partial = place.with_name(f"{place.name}.partial-{int(token):x}")
    rows = facts["samples"] if wanted is None else len(wanted)
    first: list[dict[str, Tensor]] = []
    try:
        agree(ranks, _problem(lambda: first.extend(itertools.islice(parts, 1))))
        wide = widths(first[0] if first else None, taps, ranks)
        agree(ranks, _problem(lambda: _create(partial, rows, wide, taps), ranks.main))
        agree(ranks, _problem(lambda: _fill(partial, itertools.chain(first, parts), wanted)))
        agree(ranks, _problem(lambda: _publish(partial, place, facts, wanted), ranks.main))
    finally:
        if ranks.main:
            shutil.rmtree(partial, ignore_errors=True)


def _problem(work: Callable[[], object], mine: bool = True) -> str | None:
    """Do the work where it is this rank's, and say what went wrong, for `agree`."""
    try:
        if mine:
            work()
    except InputError as error:
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


def _fill(folder: Path, parts: Iterable[dict[str, Tensor]], wanted: Sequence[int] | None) -> None:
    asked = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
    for part in parts:
        places = part["index"] if asked is None else torch.searchsorted(asked, part["index"])
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


def _publish(partial: Path, place: Path, facts: Facts, wanted: Sequence[int] | None) -> None:
    index = torch.from_numpy(np.array(np.load(partial / _file("index"), mmap_mode="r")))
    check_complete(index, wanted)
    (partial / _FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    try:
        partial.rename(place)
    except OSError:
        if not place.joinpath(_FACTS).is_file():  # else another job has stored the same meanwhile
            raise


def _read(place: Path, facts: Facts, wanted: Sequence[int] | None, taps: Sequence[str]) -> Outputs:
    stored = json.loads((place / _FACTS).read_text())
    assert stored == json.loads(json.dumps(facts)), f"{place} was made from something else"
    found = {
        # "c": what is written to the tensors stays in memory.
        name: torch.from_numpy(np.load(place / _file(name), mmap_mode="c"))
        for name in columns(taps)
    }
    result = assembled(found, taps)
    check_complete(result.index, wanted)
    return result
