"""A whole set as `.beton` files: one for each split or domain, and a page about them.

betons.json             kind, the names of the classes, notes
<part>.beton            train and test, or one for each domain
<part>.beton.json       its manifest, with digests and what was left out
<part>.beton.samples.csv
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from letheon.durable import write
from letheon.errors import InputError
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.datasets.layouts import SPLIT
from letheon.loaders.formats.beton import BetonImages, is_beton
from letheon.loaders.formats.beton_writer import BetonReport, write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.formats.shards import pair_splits

FORMAT = "letheon-betons-1"
ABOUT = "betons.json"
SUFFIXES = (".beton", ".ffcv", ".dat")  # of ffcv's files, whose name is up to their writer


def write_betons(
    source: Data | Mapping[str, ImageSet],
    out: Path,
    encoding: Encoding | None = None,
    workers: int = 0,
) -> dict[str, BetonReport]:
    """Write each part of `source` to the folder `out`; see `write_beton`.

    A part that is there already is kept, so a stopped run goes on; a finished set is refused.

    Raises:
        InputError: `out` holds a set already, or as `write_beton`.
    """
    if (out / ABOUT).exists():
        raise InputError(f"got {out}, which holds a set, expected a new folder; name another")
    parts = dict(source) if isinstance(source, Mapping) else {"train": source.train}
    if isinstance(source, Data) and source.test is not source.train:
        parts["test"] = source.test
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"got {out}, which cannot be made ({error.strerror}), expected a writable place; "
            "name another"
        ) from None
    written = {
        name: write_beton(images, out / f"{name}.beton", encoding, workers, again=True)
        for name, images in parts.items()
    }
    about: dict[str, Any] = {"format": FORMAT, "parts": list(parts)}
    about["kind"] = "splits" if isinstance(source, Data) else "domains"
    if isinstance(source, Data):
        about |= {"names": source.names, "notes": source.notes}
    write(out / ABOUT, json.dumps(about, indent=1) + "\n")
    return written


def is_betons(path: Path) -> bool:
    """Whether `write_betons` finished this folder."""
    return (path / ABOUT).is_file()


def open_betons(path: Path) -> Data | dict[str, ImageSet]:
    """The set that `write_betons` wrote to `path`; raises `InputError` if it is broken."""
    try:
        page = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if page["format"] != FORMAT:
            raise InputError(
                f"{path}: got a set of format {page['format']!r}, expected {FORMAT!r}; "
                "prepare it again"
            )
        sets: dict[str, ImageSet] = {}
        for name in page["parts"]:
            sets[name] = BetonImages(path / f"{name}.beton")
        if page["kind"] == "domains":
            return sets
        names = tuple(tuple(all_names) for all_names in page["names"])
        return Data(sets["train"], sets.get("test", sets["train"]), names, tuple(page["notes"]))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path / ABOUT}: got a broken page ({' '.join(str(error).split())}), expected what "
            "prepare wrote; prepare it again"
        ) from None


def open_ffcv(path: Path) -> Data | dict[str, ImageSet] | None:
    """Read a file that ffcv wrote, or a folder of them, by the splits in their names; else None.

    Raises:
        InputError: a broken file, or fields that do not say which is the image or the label.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    else:
        return None
    files = [file for file in files if file.is_file() and is_beton(file)]
    if not files:
        return None
    sets = {_split_of(file) if len(files) > 1 else file.stem: BetonImages(file) for file in files}
    classes = max((images.classes for images in sets.values()), key=len)
    for images in sets.values():
        if not images.manifest:  # numbers alone: a split may lack the last class
            images.classes = classes
    return pair_splits(sets)


def _split_of(file: Path) -> str:
    """The split in a name such as train_500_0.50_90.ffcv, else the name."""
    word = file.stem.partition("_")[0]
    return word if SPLIT.fullmatch(word.lower()) else file.stem
