"""Measure what is left: one row per model, beside the original and the retrained one.

    python launch/evaluate.py --original runs/original --retrained runs/retrain \
        --runs runs/salun runs/spkd --downstream digits --out runs/table
    python launch/evaluate.py --define

What was forgotten is read from the run folders; checkpoints from elsewhere need --forget. Writes
metrics.json and table.md to --out and prints the table.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from letheon.engine.distributed import Ranks
from letheon.engine.record import check_free, versions, write_atomically
from letheon.eval.measure import Conditions
from letheon.eval.table import definitions, markdown, plain
from letheon.launch.command import run_command, together
from letheon.launch.job import Job
from letheon.launch.rows import Comparison, planned


@dataclass(frozen=True, kw_only=True)
class Settings(Job):
    """Measure accuracy, k-NN transfer and CKA of any number of models."""

    original: Path | None = None
    """The model before forgetting: a run folder or a checkpoint."""
    retrained: Path | None = None
    """The model trained without the forget set: the reference of gaps and CKA."""
    runs: tuple[Path, ...] = ()
    """The models after forgetting: run folders or checkpoints."""
    model: str | None = None
    """Architecture of checkpoints that do not say theirs."""
    forget: str | None = None
    """What was forgotten, where no run folder tells: class:3,8, file:LIST or random:100."""
    downstream: str | None = None
    """Set for k-NN: `digits`, or <domain>/<class>/ folders such as Office-Home; default: none."""
    batch_size: int = 256
    conditions: Conditions = field(default_factory=Conditions)
    out: Path | None = None
    """Folder for metrics.json and table.md; default: only print."""
    overwrite: bool = False
    define: bool = False
    """Print what each metric means, and stop."""

    def comparison(self, ranks: Ranks) -> Comparison:
        """The models and sets, found and checked; nothing is computed or written yet."""
        if self.out is not None:
            check_free(self.out, self.overwrite)
        return planned(
            self, self.original, self.retrained, self.runs, self.model, self.forget,
            self.downstream,
        )  # fmt: skip


def main(settings: Settings, ranks: Ranks) -> None:
    """Plan together, measure, print and write."""
    if settings.define:
        print("\n".join(f"{name}: {text}" for name, text in definitions().items()))
        return
    comparison = together(ranks, lambda: settings.comparison(ranks))
    rows = comparison.rows(settings, settings.conditions, settings.batch_size, ranks)
    if not ranks.main:
        return
    print(plain(rows))
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        facts = {
            "rows": rows,
            "request": dataclasses.asdict(comparison.request),
            "versions": versions(ranks),
        }
        text = json.dumps(facts, indent=2, default=str)
        write_atomically(settings.out / "metrics.json", text + "\n")
        write_atomically(settings.out / "table.md", markdown(rows) + "\n")


if __name__ == "__main__":
    run_command(Settings, main)
