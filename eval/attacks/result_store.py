"""Results of relearning and attacks on disk, model by model: a stopped table goes on from them.

They lie beside the finished rows, under the digest of all they depend on, and go with them once the
table is written. On several ranks each of which computes other models nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from letheon.errors import NotMeasurable
from letheon.eval.attacks.suite import Attack
from letheon.eval.evaluate import Measuring
from letheon.eval.finished_rows import FinishedRows
from letheon.eval.probes.relearn import RelearnCurve
from letheon.eval.probes.relearn_evaluator import Curves
from letheon.eval.row_builder import Row

Result = Attack | Curves | str
"""What a stage computes of one model; a text is why there are no curves."""


def as_row(name: str, result: Result) -> Row:
    """Put a result into the form that finished rows have on disk."""
    if isinstance(result, str):
        return Row(name, why={"curves": result})
    if isinstance(result, Attack):
        why = {k: str(v) for k, v in result.results.items() if isinstance(v, NotMeasurable)}
        known = {k: v for k, v in result.results.items() if k not in why}
        return Row(name, values={"attacks": list(result.results), "results": known}, why=why)
    return Row(name, values={"curves": {key: list(curve) for key, curve in result.items()}})


def from_row(row: Row) -> Result:
    """Read a result back from that form."""
    if "attacks" in row.values:
        known = row.values["results"]
        names = row.values["attacks"]
        return Attack({k: known[k] if k in known else NotMeasurable(row.why[k]) for k in names})
    if "curves" in row.why:
        return row.why["curves"]
    return {key: RelearnCurve(*curve) for key, curve in row.values["curves"].items()}


@dataclass(frozen=True)
class ResultStore:
    """The results of one stage of a table."""

    rows: FinishedRows
    facts: Mapping[str, Mapping[str, Any]]  # name -> what its result depends on; on rank 0

    @classmethod
    def open(cls, of: Measuring, stage: str) -> ResultStore | None:
        """Open the store of a stage; None where nothing is kept. Every rank must call."""
        extent, shared = of.extent, of.ranks.world > 1 and not of.inference.splits
        if of.finished is None or shared or extent.related is not None:  # other images, unnamed
            return None
        steps = [stage, extent.relearn, extent.attacks]
        facts = of.row_facts() if of.ranks.main else {}
        return cls(of.finished, {name: {**own, "stage": steps} for name, own in facts.items()})

    def load(self) -> dict[str, Result]:
        """Read the results that are there; every rank must call, and gets the same."""
        return {name: from_row(found.row) for name, found in self.rows.load(self.facts).items()}

    def save(self, name: str, result: Result) -> None:
        """Write a model's result; every rank must call.

        Raises:
            InputError: the folder cannot be written, on every rank.
        """
        self.rows.save(self.facts.get(name, {}), as_row(name, result), None)
