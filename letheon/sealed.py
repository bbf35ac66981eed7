"""JSON files that hold the digest of their own content: sealed when written, verified when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from letheon.errors import InputError
from letheon.regular import LARGEST, read_regular, read_text

SEAL = "sha256"
"""The entry that holds the digest of all others."""


def seal(content: Mapping[str, Any]) -> bytes:
    """Format a JSON object whose last entry is the SHA-256 of the others, in canonical form."""
    plain = json.loads(json.dumps(content))
    plain.pop(SEAL, None)
    text = json.dumps({**plain, SEAL: _digest(plain)}, indent=1, ensure_ascii=False)
    return f"{text}\n".encode("utf-8", "surrogateescape")  # file names may be any bytes


def read_json(path: Path) -> Any:
    """Read a regular file of JSON of at most `LARGEST` bytes.

    Raises:
        OSError: as `read_regular`.
        ValueError: it is no JSON, or nested too deeply.
    """
    return parse_json(read_text(path))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that may be somebody else's; raises ValueError, also where it is too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_sealed(path: Path, largest: int = LARGEST, folder: int | None = None) -> dict[str, Any]:
    """Read a JSON object and verify its digest; one that never had any is read as it is.

    Whoever writes a format in which every file is sealed asks for the entry `SEAL` as well.

    Args:
        path: the file.
        largest: bytes that it may have.
        folder: as in `open_regular`.

    Raises:
        InputError: it cannot be read, is no JSON object, or is not what was sealed.
    """
    try:
        content = json.loads(read_regular(path, largest, folder).decode("utf-8", "surrogateescape"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, getattr(error, "strerror", None) or str(error)) from None
    if not isinstance(content, dict):
        raise _broken(path, f"a {type(content).__name__}")
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != _digest(rest):
        raise _broken(path, "its content is not what its digest says")
    return content


@contextmanager
def expect_shape(path: Path) -> Iterator[None]:
    """Look into the content of a JSON file: what is not as it was written raises `InputError`."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}") from None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _broken(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: got a broken file ({' '.join(reason.split())[:200]}), expected a JSON object as "
        "it was written; restore it, or make it again"
    )
