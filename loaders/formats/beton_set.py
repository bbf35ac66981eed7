"""A whole set as `.beton` files: one for each split or domain, and a page about them.

betons.json             kind, the names of the classes, notes
<part>.beton            train and test, or one for each domain
<part>.beton.json       its manifest, with digests and what was left out
<part>.beton.samples.csv
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from letheon.durable import write
from letheon.errors import InputError
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.datasets.layouts import SPLIT
from letheon.loaders.formats.arrays import as_data, check_format, check_name, texts
from letheon.loaders.formats.beton import BetonImages, is_beton
from letheon.loaders.formats.beton_writer import BetonReport, write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.formats.parts import growing
from letheon.loaders.formats.shards import pair_splits
from letheon.sealed import read_sealed, seal

FORMAT = "letheon-betons-2"
UNSEALED = "letheon-betons-1"  # of versions that noted no digests that can be verified
ABOUT = "betons.json"
SUFFIXES = (".beton", ".ffcv", ".dat")  # of ffcv's files, whose name is up to their writer


def write_betons(
    source: Data | Mapping[str, ImageSet],
    out: Path,
    encoding: Encoding | None = None,
    workers: int = 0,
) -> dict[str, BetonReport]:
    """Write each part of `source` to the new folder `out`, which appears when all is whole.

    A run that was stopped goes on with what it had (see `growing` and `write_beton`).

    Raises:
        InputError: `out` exists, or as `write_beton`.
    """
    parts = dict(source) if isinstance(source, Mapping) else {"train": source.train}
    if isinstance(source, Data) and source.test is not source.train:
        parts["test"] = source.test
    about: dict[str, Any] = {"format": FORMAT, "parts": list(parts)}
    about["kind"] = "splits" if isinstance(source, Data) else "domains"
    if isinstance(source, Data):
        about |= {"names": source.names, "notes": source.notes}
    settings = about | {"encoding": asdict(encoding or Encoding())}
    with growing(out, settings) as folder:
        written = {
            name: write_beton(images, folder / f"{name}.beton", encoding, workers, again=True)
            for name, images in parts.items()
        }
        write(folder / ABOUT, seal(about))
    return {name: replace(report, path=out / report.path.name) for name, report in written.items()}


def is_betons(path: Path) -> bool:
    """Whether `write_betons` finished this folder."""
    return (path / ABOUT).is_file()


def open_betons(path: Path) -> Data | dict[str, ImageSet]:
    """The set that `write_betons` wrote to `path`.

    Raises:
        InputError: it is of another format, broken, or not as it was sealed.
    """
    page = read_sealed(path / ABOUT)
    check_format(path, page, FORMAT, UNSEALED)
    try:
        sets: dict[str, ImageSet] = {}
        for name in texts(page["parts"]):
            sets[name] = BetonImages(path / f"{check_name(name)}.beton")
        return as_data(sets, page, path)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path / ABOUT}: got a broken page ({' '.join(str(error).split())[:200]}), expected "
            "what prepare wrote; prepare it again"
        ) from None


def open_ffcv(path: Path) -> Data | dict[str, ImageSet] | None:
    """Read a file that ffcv wrote, or a folder of them, by the splits in their names; else None.

    Raises:
        InputError: a broken file, fields that do not say which is the image or the label, two files
            of one split, or as `pair_splits`.
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
    sets: dict[str, ImageSet] = {}
    place: dict[str, Path] = {}
    for file in files:
        split = _split_of(file) if len(files) > 1 else file.stem
        first = place.setdefault(split, file)
        if first is not file:
            raise InputError(
                f"{path}: got {first.name} and {file.name}, both of the split {split!r}, expected "
                "one file for each; write the split as one file, or move the other away"
            )
        sets[split] = BetonImages(file)
    return pair_splits(sets)


def _split_of(file: Path) -> str:
    """The split in a name such as train_500_0.50_90.ffcv, else the name."""
    word = file.stem.partition("_")[0]
    return word if SPLIT.fullmatch(word.lower()) else file.stem
