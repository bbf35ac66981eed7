"""Example images for a report: what each model calls them, and their neighbors downstream."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.eval.comparison import Entry
from letheon.eval.evaluate import Inference, read_images
from letheon.eval.inference.sampling import sample_rows
from letheon.eval.metrics.knn_splits import split
from letheon.eval.search.neighbors import nearest
from letheon.loaders.datasets.image_set import ImageSet

_PIXELS = 96  # of a thumbnail's longer side, at most
_DATABASE_MOST = 500  # downstream images among which neighbors are looked for
_NEIGHBORS = 5
_SHOWN = 3  # images of each kind


@dataclass(frozen=True)
class Tile:
    """A thumbnail as a data URI, and the name of its class."""

    image: str
    name: str


@dataclass(frozen=True)
class Choice:
    """Which samples of a set are shown."""

    images: ImageSet
    key: str  # of the set in the comparison
    rows: list[int]
    kinds: list[str]  # of each row: forgotten or kept


def find_examples(read: Inference, names: Sequence[str]) -> dict[str, Any]:
    """Show a few images to each model, on this rank alone.

    Args:
        read: the comparison and how it is run.
        names: models in the order of the page, the original first where there is one.

    Returns:
        "sentence"; "answers", one an image, with what each model calls it; "domain" and
        "neighbors", one a downstream image, with the images that each model holds nearest. Empty
        where there is nothing to show.
    """
    of = read.comparison
    known = {entry.name: entry for entry in of.entries}
    entries = [known[name] for name in names if name in known]
    choice = _choose(read, _SHOWN)
    if not choice.rows or not entries:
        return {}
    answers = _answers(read, choice, entries)
    held = "held-out" if choice.key == "test" else "training"
    found: dict[str, Any] = {
        "sentence": f"Keyed choice of {held} images, and what each model calls them.",
        "answers": answers,
        "domain": "",
        "neighbors": [],
    }
    if of.domains:
        found["domain"], images = next(iter(of.domains.items()))
        found["neighbors"] = _neighbors(read, found["domain"], images, entries)
    return found


def _choose(read: Inference, count: int) -> Choice:
    """Choose held-out images of the forgotten classes, else forgotten training images."""
    of = read.comparison
    keys = ("train",) if of.nothing_held_out else ("test", "train")
    key = next((k for k in keys if of.forget_mask(k).any()), "train")
    mask = torch.from_numpy(of.forget_mask(key))
    gone = sample_rows(mask, count).tolist()
    kept = sample_rows(~mask, 1).tolist()
    kinds = ["to be forgotten"] * len(gone) + ["to be kept"] * len(kept)
    return Choice(of.sets[key], key, [*gone, *kept], kinds)


def _outputs(
    read: Inference, key: str, rows: Sequence[int], entries: Sequence[Entry]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each model's name, and its logits and features of the samples at increasing `rows`."""
    # A network that is split does not fit on one device: the few images are shown on the host.
    alone = Ranks(device=torch.device("cpu") if read.splits else read.ranks.device)
    for entry in entries:
        loader = read.loader(key, entry, alone)
        model = entry.open().to(alone.device).eval()
        with torch.no_grad():
            images, _ = read_images(loader, rows)
            parts = [model(part.to(alone.device)) for part in images.split(read.batch_size)]
        logits = torch.cat([part.logits.float().cpu() for part in parts])
        features = torch.cat([part.features.float().cpu() for part in parts])
        model.to("cpu")
        del model  # before the next one is opened
        yield entry.name, logits, features


def _answers(read: Inference, choice: Choice, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    classes, labels = read.comparison.data.classes, choice.images.labels
    order = sorted(choice.rows)
    models: dict[int, list[dict[str, Any]]] = {row: [] for row in order}
    for name, logits, _ in _outputs(read, choice.key, order, entries):
        shares, calls = logits.softmax(dim=1).max(dim=1)
        for row, share, call in zip(order, shares.tolist(), calls.tolist(), strict=True):
            right = call == int(labels[row])
            fact = {"model": name, "name": classes[call], "share": f"{share:.0%}", "right": right}
            models[row].append(fact)
    return [
        {"tile": make_tile(choice.images, row), "kind": kind, "models": models[row]}
        for row, kind in zip(choice.rows, choice.kinds, strict=True)
    ]


def _neighbors(
    read: Inference, domain: str, images: ImageSet, entries: Sequence[Entry]
) -> list[dict[str, Any]]:
    """Find the neighbors of a few queries of a domain, forgotten classes first."""
    parts = split(len(images))
    some = torch.zeros(len(images), dtype=torch.bool)
    some[parts.database] = True
    database = sample_rows(some, _DATABASE_MOST)
    gone = {read.comparison.data.classes[c] for c in read.comparison.request.classes}
    labels = torch.from_numpy(np.asarray(images.labels))
    asked = torch.zeros_like(some)
    asked[parts.queries] = True
    mask = torch.tensor([name in gone for name in images.classes])[labels] & asked
    first = sample_rows(mask, _SHOWN - 1)
    others = sample_rows(asked & ~mask, _SHOWN - len(first))
    kinds = ["of a forgotten class"] * len(first) + ["of another class"] * len(others)
    queries = [*first.tolist(), *others.tolist()]
    rows = sorted({*queries, *database.tolist()})
    place = {row: at for at, row in enumerate(rows)}
    models: dict[int, list[dict[str, Any]]] = {row: [] for row in queries}
    most = min(_NEIGHBORS, len(database))
    tiles: dict[int, Tile] = {}
    for name, _, features in _outputs(read, f"domain/{domain}", rows, entries):
        base = features[[place[row] for row in database.tolist()]]
        near = nearest(base, features[[place[row] for row in queries]], most)
        for query, found in zip(queries, near.places.tolist(), strict=True):
            numbers = [int(database[number]) for number in found]
            shown = [
                {
                    "tile": tiles.setdefault(n, make_tile(images, n)),
                    "right": bool(labels[n] == labels[query]),
                }
                for n in numbers
            ]
            models[query].append({"model": name, "tiles": shown})
    return [
        {"tile": make_tile(images, row), "kind": kind, "models": models[row]}
        for row, kind in zip(queries, kinds, strict=True)
    ]


def make_tile(images: ImageSet, row: int) -> Tile:
    """Make a thumbnail of an image, small ones as they are."""
    picture = Image.fromarray(images.read(row))
    small = max(picture.size) <= 64
    picture.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    picture.save(file, "PNG" if small else "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    code = base64.b64encode(file.getvalue()).decode()
    return Tile(f"data:image/{kind};base64,{code}", images.classes[int(images.labels[row])])
