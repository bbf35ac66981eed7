"""Forget requests: from what the user wrote to sorted class or sample numbers with a digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError, name_option, suggest
from letheon.kernels import keyed
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.views import SubsetImages
from letheon.regular import read_text

FORMS = (
    "class:3,8 class:truck file:LIST random:100 top:100 samples:LIST random-samples:10% "
    "hardest:10% easiest:500,confidence canaries"
)
RANKED = ("hardest", "easiest")
"""Requests of the samples that come first or last in a ranking by the original network."""
KINDS = ("class", "file", "random", "top", "samples", "random-samples", "canaries", *RANKED)
"""What a request begins with."""
SCORES = ("loss", "confidence")
"""What such a ranking goes by; the first where the request does not say."""


@dataclass(frozen=True)
class Request:
    """What is to be forgotten: whole classes, or single training samples."""

    text: str
    classes: tuple[int, ...]  # sorted, unique; empty for a request of samples
    samples: tuple[int, ...] | None  # sorted, unique numbers in the training set
    digest: str  # SHA-256 in hex of the unique numbers, sorted, joined by commas
    notes: tuple[str, ...] = ()  # such as an id that stood twice
    data: str = ""  # digest of the training images, where the numbers are those of samples

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], where: object) -> Request:
        """Read a request from the JSON of its fields; `where` names it in messages.

        Raises:
            InputError: A field is missing, or the numbers do not have the digest beside them.
        """
        try:
            classes = tuple(int(number) for number in facts["classes"])
            listed = facts["samples"]
            samples = None if listed is None else tuple(int(number) for number in listed)
            request = cls(
                str(facts["text"]), classes, samples, str(facts["digest"]),
                tuple(map(str, facts.get("notes", ()))), str(facts.get("data", "")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"got the request of {where}, which cannot be read ({error!r}), expected its "
                "numbers and their digest; copy the file again"
            ) from None
        own = _digest(classes if samples is None else samples)
        if own != request.digest:
            raise InputError(
                f"got the request of {where} with numbers of digest {own[:12]}, expected "
                f"{request.digest[:12]}, which stands beside them; copy the file again"
            )
        return request

    @property
    def numbers(self) -> tuple[str, str]:
        """What is compared between requests: the kind of its numbers, and their digest."""
        return "classes" if self.samples is None else "samples", self.digest


def resolve(
    text: str, data: Data, seed: int | None = None, ranking: Sequence[int] | None = None
) -> Request:
    """The request `text` on `data`; see `FORMS`.

    ``class:`` takes ids, names and WordNet ids (``id=3`` or ``name=3`` where both would fit);
    ``file:`` the same, one a line, with ``#`` comments; ``random:K`` draws by `seed`; ``top:K``
    takes the first K of `ranking`, class ids ranked by another part of the program. Of training
    samples: ``samples:`` names a file of their numbers, ``random-samples:N`` or
    ``random-samples:10%`` draws some by `seed`, ``hardest:N`` takes those that the original
    network finds hardest, by their loss (``hardest:N,confidence``: by the probability of its
    answer), ``easiest:N`` the easiest: the first of `ranking`, sample numbers in that order;
    ``canaries`` all images that stand under a planted label.

    Raises:
        InputError: Unknown, ambiguous, empty, of another dataset, or everything would be forgotten.
    """
    with name_option("forget"):
        return _resolve(text, data, seed, ranking)


def _resolve(text: str, data: Data, seed: int | None, ranking: Sequence[int] | None) -> Request:
    kind, _, rest = text.partition(":")
    rest = rest.strip()
    present = np.unique(data.train.true_labels)
    if kind == "random-samples" or kind in RANKED:
        return request_samples(text, _pick_samples(text, data, seed, ranking), data)
    if text == "canaries":
        return request_samples(text, find_canaries(data.train).tolist(), data)
    if kind == "samples" and rest:
        return request_samples(text, [_number(token, rest) for token in _lines(rest)], data)
    if kind in ("class", "file") and rest:
        ids = _parse_classes(text, data)
    elif kind in ("random", "top") and rest.isdecimal():
        ids = _first_classes(text, present, seed, ranking)
    else:
        raise InputError(
            f"got the forget request {text!r}, expected one of: {FORMS}"
            f"{'' if kind in KINDS else suggest(kind, KINDS)}"
        )
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


def _parse_classes(text: str, data: Data) -> list[int]:
    """The ids of a request that names its classes, or a file of names."""
    kind, _, rest = text.partition(":")
    index = _index(data)
    if kind == "file":
        tokens = [_shorten(token, index) for token in _lines(rest.strip())]
    else:
        tokens = _split_names(rest.strip(), index)
    return [_class(token, index, data, text) for token in tokens if token]


def name_first_class(data: Data) -> str | None:
    """Name a class that can be forgotten, as `class:` takes it: by its name, else by its id.

    Returns:
        The first class that has training images; None where there are not two.
    """
    present = np.unique(data.train.true_labels)
    if len(present) < 2:
        return None
    first = int(present[0])
    name = data.classes[first]
    try:
        known = name.isprintable() and resolve(f"class:{name}", data).classes == (first,)
    except InputError:  # a name that means several classes, or an id of another
        known = False
    return name if known else f"id={first}"


def _first_classes(
    text: str, present: NDArray[np.int64], seed: int | None, ranking: Sequence[int] | None
) -> list[int]:
    """The ids of a request for so many classes: drawn from those present, or first in a ranking."""
    kind, _, rest = text.partition(":")
    if kind == "random":
        order = keyed.permutation(_require_seed(text, seed), "forget-classes", 0, len(present))
        ranked = present[order.numpy()].tolist()
    elif ranking is None:
        raise InputError(
            f"got {text!r} without a ranking of the classes, expected a downstream set to be "
            "nearest to; name one"
        )
    else:
        ranked = list(dict.fromkeys(int(c) for c in ranking))
    if int(rest) > len(ranked):
        raise InputError(f"got {text!r}, expected at most {len(ranked)} classes; ask for fewer")
    return ranked[: int(rest)]


def score_of(text: str) -> str | None:
    """Return what a ``hardest:`` or ``easiest:`` request ranks the samples by; None of others.

    Raises:
        InputError: by something else than `SCORES`.
    """
    kind, _, rest = text.partition(":")
    if kind not in RANKED:
        return None
    score = rest.partition(",")[2].strip() or SCORES[0]
    if score not in SCORES:
        raise InputError(
            f"got {text!r}, expected a ranking by {' or '.join(SCORES)}; such as "
            f"{kind}:{rest.partition(',')[0] or '10%'},{SCORES[0]}{suggest(score, SCORES)}"
        )
    return score


def _pick_samples(
    text: str, data: Data, seed: int | None, ranking: Sequence[int] | None
) -> list[int]:
    """The sample numbers of a request for so many, or such a share, of the training samples."""
    rest = text.partition(":")[2]
    ranked = score_of(text) is not None
    amount = rest.partition(",")[0].strip() if ranked else rest.strip()
    count = _count(text, amount, len(data.train))
    if ranked:
        if ranking is None:
            raise InputError(
                f"got {text!r} without a ranking of the samples, expected that of the original "
                "network; give their numbers, or ask where the network is at hand"
            )
        return [int(number) for number in ranking[:count]]
    order = keyed.permutation(_require_seed(text, seed), "forget-samples", 0, len(data.train))
    return order[:count].tolist()


def _count(text: str, amount: str, samples: int) -> int:
    """How many of `samples` an amount is: a number, or a share in per cent, rounded to nearest."""
    share = amount.removesuffix("%")
    if re.fullmatch(r"\d+(\.\d+)?", share) and (share != amount or share.isdecimal()):
        count = round(float(share) / 100 * samples) if share != amount else int(share)
        if 0 < count < samples:
            return count
    raise InputError(
        f"got {text!r} of {samples} training samples, expected a number of 1 to {samples - 1} or "
        "a share of them; such as 10%"
    )


def _require_seed(text: str, seed: int | None) -> int:
    if seed is None:
        raise InputError(f"got {text!r} without a seed, expected one; give it", option="seed")
    return seed


def find_canaries(images: ImageSet) -> NDArray[np.int64]:
    """Find the images whose label was planted: their numbers, increasing.

    Raises:
        InputError: there is none.
    """
    numbers = np.flatnonzero(images.labels != images.true_labels)
    if not len(numbers):
        raise InputError(
            "got a model whose training images have no canaries; expected one that was trained "
            "with some",
            option="forget",
        )
    return numbers


def forget_mask(request: Request, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) bool, true for samples to forget.

    A request of samples holds for the training labels alone: it names no held-out image. A request
    of classes goes by `ImageSet.true_labels`: a canary belongs to the class that it shows.
    """
    if request.samples is None:
        return np.isin(labels, request.classes)
    assert request.samples[-1] < len(labels), "a request of samples is for the training set"
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[list(request.samples)] = True
    return mask


def leave_out_earlier(
    data: Data, request: Request | None, earlier: Sequence[Request]
) -> tuple[Data, NDArray[np.bool_]]:
    """Take out of the images what was forgotten earlier, which would be taught again as retained.

    What `request` names stays. The images keep their names; they have new numbers, those of the
    set itself are in the view's `numbers`.

    Returns:
        The data, itself where nothing is taken out, and the (N,) forget mask over its training
        images.

    Raises:
        InputError: Samples of another set were forgotten earlier, or nothing is left to be
            retained.
    """
    labels = data.train.true_labels
    forget = np.zeros(len(labels), np.bool_) if request is None else forget_mask(request, labels)
    gone = np.zeros_like(forget)
    held = np.zeros(len(data.test), np.bool_)
    for one in earlier:
        if one.samples is not None and one.data and one.data != data.train.digest:
            raise InputError(
                f"got a model that forgot {one.text}, sample numbers of images of digest "
                f"{one.data[:12]}, for images of digest {data.train.digest[:12]}, expected the "
                "same; name that set, or read as retained whatever was forgotten earlier",
                option="relearn_earlier",
            )
        gone |= forget_mask(one, labels)
        held |= np.isin(data.test.labels, one.classes)
    gone &= ~forget
    if not gone.any():
        return data, forget
    if (gone | forget).all():
        raise InputError(
            f"got {_texts(earlier)} forgotten earlier, which with the request leaves no training "
            "image to be retained, expected some; name fewer"
        )
    train = SubsetImages(data.train, np.flatnonzero(~gone))
    if data.test is data.train:
        test: ImageSet = train
    else:
        held &= ~np.isin(data.test.labels, request.classes if request is not None else ())
        test = SubsetImages(data.test, np.flatnonzero(~held)) if held.any() else data.test
    note = f"left out {int(gone.sum())} training images forgotten earlier: {_texts(earlier)}"
    train.notes = (*train.notes, note)
    return replace(data, train=train, test=test), forget[~gone]


def _texts(requests: Sequence[Request]) -> str:
    return ", ".join(request.text for request in requests)


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


def _split_names(text: str, index: dict[str, set[int]]) -> list[str]:
    """The names and ids between commas; a comma inside a name that is known divides nothing.

    Raises:
        InputError: pieces that are both names of their own and one name.
    """
    pieces, tokens = [piece.strip() for piece in text.split(",")], []
    most = 1 + max((name.count(",") for name in index), default=0)  # pieces of one name
    while pieces:
        names = (", ".join(pieces[:n]) for n in range(min(most, len(pieces)), 1, -1))
        token = next((name for name in names if _plain(_bare(name)) in index), pieces[0])
        parts = pieces[: token.count(",") + 1]
        if len(parts) > 1 and all(_plain(_bare(part)) in index for part in parts):
            raise InputError(
                f"got {token!r} in {text!r}, which names one class, and {' and '.join(parts)} name "
                "others, expected one meaning; name classes in a file, one a line, or by id"
            )
        pieces = pieces[len(parts) :]
        tokens.append(token)
    return tokens


def _bare(token: str) -> str:
    """A token without `name=` before it."""
    return token.removeprefix("name=")


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
        hint = suggest(_plain(word), index) or f"; such as {data.names[0][-1]}"
        raise InputError(
            f"got the unknown class {token!r} in {text!r}, expected an id in 0..{count - 1} or a "
            f"name{hint}"
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
    plain = name.casefold().replace("_", " ").replace("-", " ").replace(",", ", ")
    return " ".join(plain.split())


def _lines(path: str) -> list[str]:
    """The entries of a list file: one a line; comments, empty lines, CRLF and a BOM left out."""
    try:
        text = read_text(path)
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
