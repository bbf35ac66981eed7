"""Measure what is left: one row per model, beside the original and the retrained ones.

    python launch/evaluate.py --original runs/original --retrained runs/retrain \
        --runs runs/salun runs/spkd --downstream digits --out runs/table
    python launch/evaluate.py --original runs/original --retrained runs/retrain-1 runs/retrain-2 \
        --runs runs/salun --depth full --relearn 100 --random-control --out runs/audit
    python launch/evaluate.py --define

One that was stopped goes on when the same command is given again: finished rows lie in OUT.rows
until the table is whole, outputs of the models in --cache where one is named.

What was forgotten is read from the run folders; checkpoints from elsewhere need --forget. Prints
the table and writes it to --out as table.md, metrics.json, .csv and .tex, with report.html where
asked for. `docs/evaluation.md` has what each option measures.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from letheon import durable
from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.distributed import Ranks
from letheon.engine.models.original_check import Look, check_original
from letheon.engine.runs.agreement import comparison_facts
from letheon.engine.runs.plan import JobOptions
from letheon.engine.runs.run_folder import check_free, versions
from letheon.errors import InputError
from letheon.eval.attacks.session import Lessons, attack_table, relearn_table
from letheon.eval.case import Conditions
from letheon.eval.comparison import Comparison, check_images, open_comparison
from letheon.eval.evaluate import Extent, Measuring, Table
from letheon.eval.finished_rows import FinishedRows
from letheon.eval.related_images import find_related
from letheon.eval.report.definitions import define_all
from letheon.eval.report.rows import prepare
from letheon.eval.report.tables import as_text
from letheon.eval.report.write import MARK, replace_tables, settle_tables, write_report
from letheon.launch.command import run_command, together
from letheon.launch.ensembles.oracles import find_oracles
from letheon.launch.records.claim import claim
from letheon.loaders.batch import Loader
from letheon.loaders.preset import Preset
from letheon.loaders.views import list_notes


@dataclass(frozen=True, kw_only=True)
class Settings(JobOptions):
    """Measure what any number of models still know of what they were to forget."""

    original: Path | None = None
    """The model before forgetting: a run folder or a checkpoint."""
    retrained: tuple[Path, ...] = ()
    """Models trained without the forget set, with different seeds. The first is the reference of
    gap and CKA; all together give means and bands."""
    runs: tuple[Path, ...] = ()
    """The models after forgetting: run folders or checkpoints."""
    oracles: Path | None = None
    """Folder of one request in what oracles makes: names the original and the retrained models, and
    where outputs are kept, in place of --original, --retrained and --cache."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    forget: str | None = None
    """What was forgotten, where no run folder tells: class:3,8, file:LIST or random:100."""
    downstream: str | None = None
    """Set for k-NN: `digits`, or <domain>/<class>/ folders such as Office-Home, with
    <domain>_list.txt files if there are some (DomainNet-126); default: none."""
    accept_chance: bool = False
    """Measure though the original is sure of its answers and right by chance alone."""
    other_images: bool = False
    """Measure on other images than those the runs were made with; by default they are refused,
    since numbers of samples would mean other images, and accuracies be of others."""
    random_control: bool = False
    """Add a row for an untrained network of the same architecture; ZRF needs it."""
    batch_size: int = 256
    extent: Extent = field(default_factory=Extent)
    conditions: Conditions = field(default_factory=Conditions)
    report: bool = False
    """Write report.html too; --depth full always does."""
    out: Path | None = None
    """Folder for what is written; default: only print."""
    overwrite: bool = False
    define: bool = False
    """Print what each metric means, and stop."""

    @property
    def page(self) -> bool:
        """Whether report.html is wanted."""
        return self.report or self.extent.full

    @property
    def rows_folder(self) -> Path | None:
        """Where finished rows are kept until the table is written; None where none is."""
        return None if self.out is None else self.out.with_name(f"{self.out.name}.rows")

    def with_oracles(self) -> Settings:
        """Return these settings with the models and outputs of an ensemble named one by one."""
        if self.oracles is None:
            return self
        if self.original is not None or self.retrained:
            raise InputError(
                "got an ensemble beside original or retrained models; expected one of them",
                option="oracles",
            )
        original, retrained, outputs = find_oracles(self.oracles)
        extent = dataclasses.replace(self.extent, cache=self.extent.cache or outputs)
        return dataclasses.replace(
            self, oracles=None, original=original, retrained=retrained, extent=extent
        )

    def comparison(self, ranks: Ranks) -> Comparison:
        """The models and sets, found and checked; nothing is computed or written yet."""
        if self.out is not None:
            check_free(self.out, self.overwrite)
        elif self.page or self.extent.relearn:
            raise InputError(
                "got no folder for --report, --depth full or --relearn; name one", option="out"
            )
        if self.page and importlib.util.find_spec("matplotlib") is None:
            raise InputError(
                "got no matplotlib, which draws the report; pip install '.[report]' in the checkout"
            )
        found = open_comparison(
            self, self.original, self.retrained, self.runs, self.checkpoint, self.forget,
            self.downstream, self.random_control,
        )  # fmt: skip
        if ranks.main and not self.other_images:
            check_images(found.entries, found.opened)
        if self.extent.related is not None:
            find_related(
                self.extent.related, found, self.seed, 1
            )  # refuses what cannot be learned from
        return found


def main(settings: Settings, ranks: Ranks) -> None:
    """Plan together, measure, print and write."""
    if settings.define:
        print("\n".join(define_all()))
        return
    settings = together(ranks, settings.with_oracles)
    outs = [] if settings.out is None else [settings.out]
    with claim(outs, ranks, settle_tables):
        measure(settings, ranks)


def measure(settings: Settings, ranks: Ranks) -> None:
    """Measure, print and write, under the lock of the output folder."""
    comparison = together(
        ranks,
        lambda: settings.comparison(ranks),
        lambda one: comparison_facts(settings, one.request, one.opened or one.data, ranks),
    )
    notes = [*list_notes(comparison.sets), *(f"warning: {line}" for line in comparison.warnings)]
    for line in notes if ranks.main else ():
        print(line, file=sys.stderr)
    finished = None if settings.rows_folder is None else FinishedRows(settings.rows_folder, ranks)
    measuring = Measuring(
        settings, comparison, settings.conditions, settings.extent, settings.batch_size, ranks,
        finished,
    )  # fmt: skip
    if not settings.accept_chance:
        check_originals(settings, comparison, measuring)
    table = measuring.measure()
    lessons = Lessons(measuring.inference)
    if settings.extent.relearn:
        relearn_table(measuring, table, lessons)
    if settings.extent.full and settings.extent.attacks:
        attack_table(measuring, table, lessons)
    if not ranks.main:
        return
    print(as_text(prepare(table.flat, table.left_out)))
    band = table.band
    if band["pairs"]:
        print(
            f"CKA between retrained models: {band['low']:.3f} to {band['high']:.3f} "
            f"({band['pairs']} pairs)"
        )
    if settings.out is not None:
        facts: dict[str, Any] = {
            "request": dataclasses.asdict(comparison.request),
            "cka_band": band,
        }
        facts["notes"] = notes
        facts["left_out"] = {key: images.left_out for key, images in comparison.sets.items()}
        write(settings, table, {**facts, "versions": versions(ranks)})
    if finished is not None:
        finished.remove()


def check_originals(settings: Settings, of: Comparison, measuring: Measuring) -> None:
    """Refuse an original that does not know the images; see `check_original`.

    One whose outputs on them are stored was looked at when they were made.
    """
    images, forget, ranks = of.sets["train"], of.forget_mask("train"), measuring.ranks
    precision = settings.precision.resolve(ranks.device)
    for entry in of.of_role("original"):
        if measuring.inference.is_stored(entry, "train"):
            continue

        def open_as(preset: Preset) -> Loader:
            return settings.loader_of(images, forget, preset, settings.batch_size, ranks)

        loader, mask = open_as(entry.model.preset), torch.from_numpy(forget)
        check_original(Look(entry.model, loader, mask, precision, ranks, open_as))


def write(settings: Settings, table: Table, facts: Mapping[str, Any]) -> None:
    """Write the table, the report's files and what they were made under."""
    assert settings.out is not None
    with replace_tables(settings.out) as folder:
        files = write_report(table.flat, folder, table.left_out, page=settings.page)
        durable.write(folder / MARK, json.dumps(facts, indent=2, default=str) + "\n")
    print("wrote", ", ".join(path.name for path in files), "to", settings.out)


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
