"""Opening data by path: "digits", a folder, an archive, a list file or a prepared set."""

from __future__ import annotations

from pathlib import Path

from letheon.errors import InputError
from letheon.loaders.datasets import digits, layouts, list_files
from letheon.loaders.datasets.archives import open_tree
from letheon.loaders.datasets.cifar import read_cifar
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.formats import arrays
from letheon.loaders.formats.beton_set import is_betons, open_betons


def open_source(path: str) -> Data | dict[str, ImageSet]:
    """Whatever is at `path`: train and test, or domains by name.

    Raises:
        InputError: Nothing is there, or it has no layout that `folders` or `lists` know.
    """
    if path == "digits":
        train, test = digits.upstream()
        return Data(train, test, tuple((name,) for name in train.classes))
    if arrays.is_prepared(Path(path)):
        return arrays.open_arrays(Path(path))
    if is_betons(Path(path)):
        return open_betons(Path(path))
    if (listed := list_files.open_lists(Path(path))) is not None:
        return listed
    tree = open_tree(Path(path))
    cifar = read_cifar(tree)
    if cifar is not None:
        return cifar
    layout = layouts.recognize_layout(tree)
    if (listed := list_files.lists_beside(tree, layout)) is not None:
        return listed
    if layout.kind == "splits":
        return layouts.splits(tree, layout)
    if layout.kind == "flat":
        return layouts.flat(tree, layout)
    return layouts.domains(tree, layout)


def open_data(path: str) -> Data:
    """Train and test images at `path`: "digits", a folder, an archive or a prepared set.

    Raises:
        InputError: As `open_source`, or the set has domains instead.
    """
    data = open_source(path)
    if isinstance(data, Data):
        return data
    raise InputError(
        f"{path}: got {len(data)} domain(s) ({', '.join(list(data)[:4])}), expected train/ and "
        "test/ or val/ with class folders; a downstream set cannot be trained on"
    )


def open_domains(path: str) -> dict[str, ImageSet]:
    """Domains by name: "digits" (four redrawings), a layout of domains, lists, or class folders.

    Raises:
        InputError: As `open_source`, or the set has train and test instead.
    """
    if path == "digits":
        return dict(digits.downstream())
    found = open_source(path)
    if isinstance(found, Data):
        raise InputError(
            f"{path}: got train and test images, expected <domain>/<class>/ or <class>/ folders; "
            "name one of its splits to read that as a domain"
        )
    return found
