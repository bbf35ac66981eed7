"""Rows of an evaluation on disk as they are finished: one that was stopped goes on from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from letheon import durable
from letheon.engine.distributed import Ranks, agree, gather_objects
from letheon.errors import RunFailed
from letheon.eval.row_builder import Row
from letheon.sealed import read_json

ROWS = ".rows"
"""What the folder's name has more than that of the table."""


@dataclass(frozen=True)
class FinishedRow:
    """A row, and what the metrics of several runs read of its model."""

    row: Row
    margins: Tensor | None = None  # (n,) float64, where they were wanted


@dataclass(frozen=True)
class FinishedRows:
    """One file a row, named by the digest of all that the row depends on; rank 0 reads and writes.

    A file is used only where its facts are those of today and its content has its own digest.
    """

    folder: Path
    ranks: Ranks

    def load(self, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, FinishedRow]:
        """Read the rows that are there; every rank must call, and gets the same.

        Args:
            facts: name -> what its row depends on, as JSON holds it.
        """
        found: dict[str, FinishedRow] = {}
        if self.ranks.main:
            for name, of in facts.items():
                content = self._read(of)
                if content is not None:
                    own = content["margins"]
                    margins = None if own is None else torch.tensor(own, dtype=torch.float64)
                    found[name] = FinishedRow(Row(**content["row"]), margins)
        return gather_objects(found, self.ranks)[0]

    def _read(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            content = read_json(self._place(facts))
            digest = content.pop("digest")
        except (OSError, ValueError, KeyError, AttributeError):
            return None
        same: bool = digest == _digest(content) and content["facts"] == json.loads(_text(facts))
        return content if same else None

    def save(self, facts: Mapping[str, Any], row: Row, margins: Tensor | None) -> None:
        """Write a row; every rank must call.

        Raises:
            InputError: the folder cannot be written, on every rank.
        """
        problem = None
        if self.ranks.main:
            content: dict[str, Any] = {"facts": facts, "row": asdict(row)}
            content["margins"] = None if margins is None else margins.tolist()
            content = json.loads(_text(content))  # tuples as lists, as they are read
            place = self._place(facts)
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                durable.write(place, _text({**content, "digest": _digest(content)}))
            except (OSError, RunFailed) as error:
                problem = f"got {error} while a finished row was stored; free space there"
        agree(self.ranks, problem)

    def remove(self) -> None:
        """Remove the folder, once the table is on disk."""
        if self.ranks.main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, facts: Mapping[str, Any]) -> Path:
        return self.folder / f"{_digest(facts)[:32]}.json"


def _text(content: Any) -> str:
    """As JSON, tables in their order: layers are drawn in it."""
    return json.dumps(content, default=_plain)


def _plain(value: Any) -> Any:
    """NumPy's and torch's numbers as Python's, whatever else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _digest(content: Any) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()
