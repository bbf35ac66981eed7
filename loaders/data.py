"""Opening data by path: "digits", a folder, an archive, a list file or a prepared set."""

from __future__ import annotations

from pathlib import Path

from letheon.loaders import digits, folders, lists, prepared
from letheon.loaders.archives import open_tree
from letheon.loaders.betons import is_betons, open_betons
from letheon.loaders.cifar import read_cifar
from letheon.loaders.errors import InputError
from letheon.loaders.images import Data, ImageSet


def open_source(path: str) -> Data | dict[str, ImageSet]:
    """Whatever is at `path`: train and test, or domains by name.

    Raises:
        InputError: Nothing is there, or it has no layout that `folders` or `lists` know.
    """
    if path == "digits":
        train, test = digits.upstream()
        return Data(train, test, tuple((name,) for name in train.classes))
    if prepared.is_prepared(Path(path)):
        return prepared.opened(Path(path))
    if is_betons(Path(path)):
        return open_betons(Path(path))
    if (listed := lists.named(Path(path))) is not None:
        return listed
    tree = open_tree(Path(path))
    cifar = read_cifar(tree)
    if cifar is not None:
        return cifar
    layout = folders.recognised(tree)
    if (listed := lists.beside(tree, layout)) is not None:
        return listed
    if layout.kind == "splits":
        return folders.splits(tree, layout)
    if layout.kind == "flat":
        return folders.flat(tree, layout)
    return folders.domains(tree, layout)


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
