"""Digests of the pieces of a prepared file: each piece is verified when it is first read.

A piece is a blob of a `.beton` or a few rows of an array. The digests lie in a file beside it, 16
bytes a piece (the head of SHA-256), whose own SHA-256 is in the set's sealed page. So opening a set
reads no image, and reading an image again costs a look at one byte.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from letheon.errors import InputError
from letheon.regular import open_regular

BYTES = 16  # of a piece's digest
PIECE = 2**16  # bytes of array rows that share a digest

Content = Callable[[int], Any]
"""The bytes of a piece, by its number, without a copy where that is possible."""


def piece_digest(content: Any) -> bytes:
    """Head of the SHA-256 of a piece's bytes."""
    return hashlib.sha256(content).digest()[:BYTES]


class PieceDigests:
    """The digests of a file's pieces, and which of them have been verified.

    Processes that are forked from this one share what has been verified, both ways.
    """

    def __init__(self, file: Path, count: int, sha256: str) -> None:
        """Map the digests of `count` pieces from `file`, whose own digest is `sha256`.

        Raises:
            InputError: the file is not there, or not as it was written.
        """
        try:
            with open_regular(file) as opened:
                data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if count else b""
        except (OSError, ValueError) as error:
            raise _differs(file, getattr(error, "strerror", None) or str(error)) from None
        if len(data) != count * BYTES or hashlib.sha256(data).hexdigest() != sha256:
            raise _differs(file, "its digest differs")
        self._digests = np.frombuffer(data, np.uint8).reshape(count, BYTES)
        # Anonymous and shared: no name that could be left behind.
        self._verified = np.frombuffer(mmap.mmap(-1, max(count, 1)), np.uint8)

    def find_damage(self, pieces: NDArray[np.int64], content: Content) -> list[int]:
        """Verify those of `pieces` that were not yet; the numbers of those that differ."""
        damage = []
        for piece in np.unique(pieces[self._verified[pieces] == 0]).tolist():
            if piece_digest(content(piece)) == self._digests[piece].tobytes():
                self._verified[piece] = 1
            else:
                damage.append(piece)
        return damage


def load_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory, read only.

    Raises:
        InputError: it cannot be read, or holds no array.
    """
    try:
        open_regular(path).close()
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy raises many kinds on broken headers
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise _differs(path, reason[:200] or type(error).__name__) from None
    if not isinstance(array, np.ndarray):
        raise _differs(path, "no array")
    return array


def _differs(file: Path, reason: str) -> InputError:
    return InputError(
        f"{file}: got a broken file ({reason}), expected it as it was written; prepare it again"
    )
