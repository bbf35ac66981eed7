"""Digests of stored outputs: written with them, and verified each time they are opened.

A column is digested in blocks, which the ranks share out among them, so that verifying costs about
what reading the file once does, divided by the ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from letheon.engine.distributed import Ranks
from letheon.errors import InputError
from letheon.loaders.order import share
from letheon.regular import open_regular

BLOCK = 2**22  # bytes

Digests = Mapping[str, Sequence[str]]
"""For each file of a folder the SHA-256 in hex of its blocks."""


def digest_columns(folder: Path, files: Iterable[str]) -> dict[str, list[str]]:
    """Digest every block of the files of a folder."""
    digests: dict[str, list[str]] = {}
    for name in files:
        with open_regular(folder / name) as file:
            blocks = iter(lambda file=file: file.read(BLOCK), b"")  # type: ignore[misc]
            digests[name] = [hashlib.sha256(block).hexdigest() for block in blocks]
    return digests


def check_columns(folder: Path, digests: Digests, ranks: Ranks) -> None:
    """Compare this rank's share of the blocks with their digests.

    Raises:
        InputError: a file is missing, of another length, or damaged; it is named.
    """
    for name, blocks in digests.items():
        path = folder / name
        mine = share(len(blocks), ranks.rank, ranks.world)
        try:
            with open_regular(path) as file:
                size = file.seek(0, 2)
                whole = (len(blocks) - 1) * BLOCK < size <= len(blocks) * BLOCK
                file.seek(mine.start * BLOCK)
                same = whole and all(
                    hashlib.sha256(file.read(BLOCK)).hexdigest() == block for block in blocks[mine]
                )
        except OSError as error:
            raise _refuse(path, error.strerror or "it cannot be read") from None
        if not same:
            raise _refuse(path, "not what was written, by its digest")


def _refuse(path: Path, reason: str) -> InputError:
    return InputError(
        f"got the stored outputs {path} ({reason}); expected them as they were written; remove the "
        f"folder {path.parent}, and they are made again"
    )
