"""Forget requests: from what the user wrote to sorted class or sample numbers with a digest."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.kernels import keyed
from letheon.loaders.datasets.image_set import Data

FORMS = "class:3,8 class:truck file:LIST random:100 top:100 samples:LIST"


@dataclass(frozen=True)
class Request:
    """What is to be forgotten: whole classes, or single training samples."""

    text: str
    classes: tuple[int, ...]  # sorted, unique; empty for a request of samples
    samples: tuple[int, ...] | None  # sorted, unique numbers in the training set
    digest: str  # SHA-256 in hex of the unique numbers, sorted, joined by commas
    notes: tuple[str, ...] = ()  # such as an id that stood twice


def resolve(
    text: str, data: Data, seed: int | None = None, nearest: Sequence[int] | None = None
) -> Request:
    """The request `text` on `data`; see `FORMS`.

    ``class:`` takes ids, names and WordNet ids (``id=3`` or ``name=3`` where both would fit);
    ``file:`` the same, one a line, with ``#`` comments; ``random:K`` draws by `seed`; ``top:K``
    takes the first K of `nearest`, class ids ranked by another part of the program; ``samples:``
    names a file of training sample numbers.

    Raises:
        InputError: Unknown, ambiguous, empty, of another dataset, or everything would be forgotten.
    """
    kind, _, rest = text.partition(":")
    rest = rest.strip()
    present = np.unique(data.train.labels)
    if kind == "samples" and rest:
        return request_samples(text, [_number(token, rest) for token in _lines(rest)], data)
    if kind in ("class", "file") and rest:
        tokens = _lines(rest) if kind == "file" else [t.strip() for t in rest.split(",")]
        index = _index(data)
        if kind == "file":
            tokens = [_shorten(token, index) for token in tokens]
        ids = [_class(token, index, data, text) for token in tokens if token]
    elif kind in ("random", "top") and rest.isdecimal():
        if kind == "random":
            if seed is None:
                raise InputError(
                    f"got {text!r} without a seed, expected one; give it", option="seed"
                )
            order = keyed.permutation(seed, "forget-classes", 0, len(present)).numpy()
            ranked = present[order].tolist()
        else:
            if nearest is None:
                raise InputError(
                    f"got {text!r} without a ranking of the classes, expected a downstream set to "
                    "be nearest to; name one"
                )
            ranked = list(dict.fromkeys(int(c) for c in nearest))
        if int(rest) > len(ranked):
            raise InputError(f"got {text!r}, expected at most {len(ranked)} classes; ask for fewer")
        ids = ranked[: int(rest)]
    else:
        raise InputError(f"got the forget request {text!r}, expected one of: {FORMS}")
    if not ids:
        raise InputError(f"got {text!r}, which names no class, expected at least one; fill it")
    classes, notes = _unique(ids)
    chosen = np.isin(present, classes)
    if not chosen.any():
        raise InputError(
            f"got {text!r}, which no training image belongs to, expected at least one; "
            "name another class"
        )
    if chosen.all():
        raise InputError(
            f"got {text!r}, which is all {len(present)} classes, expected some to be retained; "
            "name fewer"
        )
    return Request(text, classes, None, _digest(classes), notes)


def forget_mask(request: Request, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) bool, true for samples to forget.

    A request of samples holds for the training labels alone: it names no held-out image.
    """
    if request.samples is None:
        return np.isin(labels, request.classes)
    assert request.samples[-1] < len(labels), "a request of samples is for the training set"
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[list(request.samples)] = True
    return mask


def request_samples(text: str, listed: Sequence[int], data: Data) -> Request:
    """Make the request for these training sample numbers, which messages call `text`.

    Raises:
        InputError: no sample, all of them, or numbers that are not of this set.
    """
    if data.train.left_out:
        raise InputError(
            f"got {text!r} and {len(data.train.left_out)} unreadable images left out, which "
            "changes the numbers; mend these images, or prepare the set and number it anew"
        )
    count = len(data.train)
    samples, notes = _unique(listed)
    if samples and samples[0] < 0:
        raise InputError(f"got sample {samples[0]} in {text!r}, expected 0..{count - 1}")
    if not samples:
        raise InputError(f"got {text!r}, which names no sample, expected at least one; fill it")
    if samples[-1] >= count:
        raise InputError(
            f"got sample {samples[-1]} in {text!r}, expected 0..{count - 1}; "
            "is it a list of another dataset?"
        )
    if len(samples) == count:
        raise InputError(f"got {text!r}, which is every sample, expected some to be retained")
    return Request(text, (), samples, _digest(samples), notes)


def _index(data: Data) -> dict[str, set[int]]:
    """The class ids by every name of theirs, in the form in which names are compared."""
    index: dict[str, set[int]] = {}
    for number, names in enumerate(data.names):
        for name in names:
            index.setdefault(_plain(name), set()).add(number)
    return index


def _class(token: str, index: dict[str, set[int]], data: Data, text: str) -> int:
    """The class id a token means: an id, or any of the class's names, whatever case or "_"."""
    how, _, rest = token.partition("=")
    by_id = how != "name" or not rest
    by_name = how != "id" or not rest
    word = rest.strip() if rest and how in ("id", "name") else token
    found = set(index.get(_plain(word), ())) if by_name else set()
    if by_id and word.isdecimal() and (int(word) < len(data.names) or not found):
        found.add(int(word))
    if len(found) > 1:
        options = ", ".join(f"id={i}" for i in sorted(found))
        raise InputError(f"got {token!r} in {text!r}, expected one class; write one of {options}")
    count = len(data.names)
    if not found:
        near = difflib.get_close_matches(_plain(word), list(index), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"such as {data.names[0][-1]}"
        raise InputError(
            f"got the unknown class {token!r} in {text!r}, expected an id in 0..{count - 1} or a "
            f"name; {hint}"
        )
    (number,) = found
    if number >= count:
        raise InputError(
            f"got class {number} in {text!r}, expected ids in 0..{count - 1}; "
            "is it a list of another dataset?"
        )
    return number


def _shorten(line: str, index: dict[str, set[int]]) -> str:
    """The part of a list's line that names a class: all of it, or what a comma or space ends.

    ImageNet's own lists go on after the id: "n01440764 tench, Tinca tinca".
    """
    if _plain(line) in index:
        return line
    parts = (re.split(mark, line, maxsplit=1)[0].strip() for mark in ("[,\t;]", r"\s"))
    return next((part for part in parts if _plain(part) in index or part.isdecimal()), line)


def _plain(name: str) -> str:
    """The form in which names are compared."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _lines(path: str) -> list[str]:
    """The entries of a list file: one a line; comments, empty lines, CRLF and a BOM left out."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(
            f"got the list {path}, which cannot be read ({reason}), expected a text file with one "
            "entry a line; check the path"
        ) from None
    lines = (f" {line}".partition(" #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _number(token: str, path: str) -> int:
    if not token.isdecimal():
        raise InputError(f"got {token!r} in {path}, expected a sample number; mend that line")
    return int(token)


def _unique(ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids sorted and without repeats, and a note for each that stood more than once."""
    counts: dict[int, int] = {}
    for number in ids:
        counts[number] = counts.get(number, 0) + 1
    times = {2: "twice"}
    notes = tuple(
        f"id {number} stood {times.get(count, f'{count} times')}; counted once"
        for number, count in sorted(counts.items())
        if count > 1
    )
    return tuple(sorted(counts)), notes


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
