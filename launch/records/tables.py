"""Know a finished table again by what it was made of: the same command gives it back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from letheon.errors import InputError
from letheon.eval.evaluate import Measuring
from letheon.eval.metrics.registry import metrics
from letheon.eval.report.write import MARK
from letheon.regular import LARGEST, read_regular
from letheon.sealed import expect_shape, read_sealed

ORIGIN, FILES = "origin", "files"
"""Entries of `MARK`: the digest of all that the table depends on; file -> its SHA-256."""
_TABLE = "metrics.json"


class FinishedTable(NamedTuple):
    """What a finished evaluation wrote."""

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    files: list[Path]


def table_digest(measuring: Measuring, page: bool) -> str:
    """SHA-256 in hex of models, images, settings and code of an evaluation; one rank is enough.

    Args:
        measuring: the evaluation; nothing of it has been computed.
        page: whether it writes a page.
    """
    of = measuring.comparison
    extent = replace(measuring.extent, cache=None)
    content = {
        "rows": measuring.row_facts(),
        "left_out": of.left_out,
        "extent": asdict(extent),
        "seed": measuring.job.seed,
        "settings": {entry.name: entry.settings for entry in of.entries},
        "page": page,
        "metrics": sorted(metrics()),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    """File name -> SHA-256 in hex of its content."""
    return {
        path.name: hashlib.sha256(read_regular(path, LARGEST)).hexdigest() for path in sorted(files)
    }


def read_same_table(out: Path, digest: str) -> FinishedTable | None:
    """Read the table of a folder where it was made of the same and is whole; None otherwise."""
    try:
        mark = read_sealed(out / MARK)
        with expect_shape(out / MARK):
            files = [out / name for name in mark.get(FILES, {})]
            if mark.get(ORIGIN) != digest or file_digests(files) != mark[FILES]:
                return None
        table = read_sealed(out / _TABLE)
        with expect_shape(out / _TABLE):
            return FinishedTable(list(table["rows"]), dict(table.get("left_out", {})), files)
    except (OSError, InputError):
        return None
