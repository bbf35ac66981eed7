"""Measure what is left: one row per model, beside the original and the retrained ones.

    python launch/evaluate.py --original runs/original --retrained runs/retrain \
        --runs runs/salun runs/spkd --downstream digits --out runs/table
    python launch/evaluate.py --original runs/original --retrained runs/retrain-1 runs/retrain-2 \
        --runs runs/salun --depth full --relearn 100 --random-control --out runs/audit
    python launch/evaluate.py runs/digits --report --out runs/digits/table
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import tyro

from letheon import durable
from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.distributed import Ranks, gather_objects
from letheon.engine.models.original_check import Look, check_original
from letheon.engine.precision import say_slower
from letheon.engine.runs.agreement import comparison_facts
from letheon.engine.runs.plan import JobOptions
from letheon.engine.runs.run_folder import check_free, versions
from letheon.errors import InputError, install_extra
from letheon.eval.attacks.session import measure_all
from letheon.eval.case import Conditions
from letheon.eval.comparison import (
    Comparison,
    add_random_control,
    check_images,
    open_comparison,
)
from letheon.eval.evaluate import Extent, Measuring, Table
from letheon.eval.examples import find_examples
from letheon.eval.finished_rows import ROWS, FinishedRows
from letheon.eval.inference.networks import count_held
from letheon.eval.report.definitions import define_all
from letheon.eval.report.facts import describe_comparison
from letheon.eval.report.pictures import select_rows
from letheon.eval.report.rows import prepare
from letheon.eval.report.tables import as_text
from letheon.eval.report.write import MARK, replace_tables, settle_tables, write_report
from letheon.folders import can_replace, free_path
from letheon.launch.command import run_command, together
from letheon.launch.console.following import changed_options, command_line
from letheon.launch.console.summary import Summary, console
from letheon.launch.ensembles.oracles import find_oracles
from letheon.launch.jobs.find_runs import find_runs
from letheon.launch.planning.dry_run import check_world, describe_sweeps
from letheon.launch.records.claim import claim
from letheon.launch.records.tables import (
    FILES,
    ORIGIN,
    FinishedTable,
    file_digests,
    read_same_table,
    table_digest,
)
from letheon.loaders.batch import Loader
from letheon.loaders.preset import Preset
from letheon.loaders.views import list_notes
from letheon.progress import clear, note, say, show


@dataclass(frozen=True, kw_only=True)
class Settings(JobOptions):
    """Measure what any number of models still know of what they were to forget."""

    folder: tyro.conf.Positional[Path | None] = None
    """Folder of runs: original, retrained and the others are found by their records, where they are
    not named."""
    original: Path | None = None
    """The model before forgetting: a run folder or a checkpoint."""
    other_originals: tuple[Path, ...] = ()
    """Models trained on the same images with other seeds: they forgot nothing, and give the
    original's own spread, three at least with it."""
    retrained: tuple[Path, ...] = ()
    """Models trained without the forget set, with different seeds. The first is the reference of
    gap and CKA; all together give means and bands."""
    runs: tuple[Path, ...] = ()
    """The models after forgetting: run folders or checkpoints."""
    oracles: Path | None = None
    """Folder of one request in what oracles makes: names the originals, the retrained models and
    where outputs are kept, in place of --original, --other-originals, --retrained and --cache."""
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
    since numbers of samples would mean other images, and accuracies be of others. Canaries are not
    planted in them."""
    random_control: bool = False
    """Add a row for an untrained network of the same architecture; ZRF needs it."""
    batch_size: int = 256
    """Images of one global batch."""
    save_every: str = "10min"
    """With --cache, save the answers of a pass under way every so often: 10min, 30s, 2h, or
    500steps (batches), and whenever 256 MiB of them are held. off: only then, and when a signal
    stops the command."""
    extent: Extent = field(default_factory=Extent)
    conditions: Conditions = field(default_factory=Conditions)
    report: bool = False
    """Write report.html too; --depth full always does."""
    out: Path | None = None
    """Folder for what is written; default: only print."""
    overwrite: bool = False
    """Replace a table that is already in the folder."""
    dry_run: int = 0
    """Plan for so many ranks (1 to 512), print what each would read and hold, and stop; nothing is
    written. One process is enough."""
    define: bool = False
    """Print what each metric means, and stop."""

    def expand(self) -> Settings:
        """Return the settings with the runs that the folder holds."""
        if self.folder is None:
            return self
        found = find_runs(self.folder)
        return replace(
            self,
            original=self.original or found.find_original(self.other_originals),
            retrained=self.retrained or found.retrained,
            runs=self.runs or found.runs,
        )

    @property
    def page(self) -> bool:
        """Whether report.html is wanted."""
        return self.report or self.extent.full

    @property
    def rows_folder(self) -> Path | None:
        """Where finished rows are kept until the table is written; None where none is."""
        if self.out is None or not can_replace(self.out):
            return None  # nothing can be written beside it
        place = self.out.resolve()
        return place.with_name(f"{place.name}{ROWS}")

    @property
    def has_table(self) -> bool:
        """Whether the folder holds a table, which the same command does not measure again."""
        return self.out is not None and (self.out / MARK).is_file()

    def with_oracles(self) -> Settings:
        """Return these settings with the models and outputs of an ensemble named one by one."""
        if self.oracles is None:
            return self
        if self.original is not None or self.other_originals or self.retrained:
            raise InputError(
                "got an ensemble beside original or retrained models; expected one of them",
                option="oracles",
            )
        (original, *others), retrained, outputs = find_oracles(self.oracles)
        extent = dataclasses.replace(self.extent, cache=self.extent.cache or outputs)
        return dataclasses.replace(
            self, oracles=None, original=original, other_originals=tuple(others),
            retrained=retrained, extent=extent,
        )  # fmt: skip

    def comparison(self, ranks: Ranks) -> Comparison:
        """The models and sets, found and checked; nothing is computed or written yet."""
        SaveOptions(self.save_every)
        if self.other_originals and self.original is None:
            raise InputError(
                "got other originals without the original that was made to forget; name it",
                option="other_originals",
            )
        if self.out is not None:
            if self.overwrite or not self.has_table:  # one that is there is compared later
                check_free(self.out, self.overwrite)
        elif self.page or self.extent.relearn:
            raise InputError(
                "got no folder for --report, --depth full or --relearn; name one", option="out"
            )
        if self.page and not draws():
            raise InputError(
                f"got no matplotlib; expected it, which draws the report; {install_extra('report')}"
            )
        first = [] if self.original is None else [self.original]
        found = open_comparison(
            self, [*first, *self.other_originals], self.retrained, self.runs, self.checkpoint,
            self.forget, self.downstream, self.other_images,
        )  # fmt: skip
        if self.random_control:
            found = add_random_control(found, self.seed)
        if ranks.main and not self.other_images:
            check_images(found.entries, found.opened)
        self.extent.check(found, self.seed)
        return found


def draws() -> bool:
    """Whether matplotlib is there, which draws the report."""
    return importlib.util.find_spec("matplotlib") is not None


def main(settings: Settings, ranks: Ranks, keep: bool = False) -> None:
    """Plan together, measure, print and write.

    Args:
        settings: what to measure.
        ranks: the job.
        keep: give back a table made of the same, though what is there may be overwritten.
    """
    if settings.define:
        console().show_text("definitions", "\n".join(define_all()))
        return
    settings = together(ranks, settings.with_oracles)
    settings = together(ranks, settings.expand)
    if settings.dry_run:
        of = settings.comparison(check_world(settings.dry_run, ranks))
        if not settings.accept_chance:
            alone = Ranks(device=ranks.device)
            check_originals(settings, of, _measuring(settings, of, alone))
        heads = [entry.model.head for entry in of.entries]
        values = sum(head.in_features + head.out_features for head in heads)
        sizes = {key: len(images) for key, images in of.sets.items()}
        inference = _measuring(settings, of, Ranks(device=ranks.device)).inference
        weights = count_held(inference.groups(of.entries, settings.dry_run))
        name = f"{len(heads)} models"
        plan = describe_sweeps(name, sizes, settings.dry_run, values, weights)
        console().show_text("plan", plan)
        return
    outs = [] if settings.out is None else [settings.out]
    with claim(outs, ranks, settle_tables):
        measure(settings, ranks, keep)


def measure(settings: Settings, ranks: Ranks, keep: bool = False) -> None:
    """Measure, print and write, under the lock of the output folder; see `main`."""
    comparison = together(
        ranks,
        lambda: settings.comparison(ranks),
        lambda one: comparison_facts(settings, one.request, one.opened or one.data, ranks),
    )
    notes = [*list_notes(comparison.sets), *(f"warning: {line}" for line in comparison.warnings)]
    if ranks.main:
        slower = say_slower(settings.precision, ranks.device)
        for line in filter(None, (*notes, slower)):
            say(line)
    finished = None if settings.rows_folder is None else FinishedRows(settings.rows_folder, ranks)
    measuring = _measuring(settings, comparison, ranks, finished)
    before = together(ranks, lambda: find_same_table(settings, measuring, keep))
    if gather_objects(before is not None, ranks)[0]:
        if before is not None:
            print_table(before.rows, before.left_out)
            note(f"{settings.out}: already done by the same command")
            console().close(summarize(settings, comparison, *before))
        if finished is not None:  # where one that wrote the table was killed before it did
            finished.remove()
        return
    if not settings.accept_chance:
        check_originals(settings, comparison, measuring)
    table = measure_all(measuring)
    if not ranks.main:
        return
    print_table(table.flat, table.left_out)
    band = table.band
    if console().prints and band["pairs"]:
        print(
            f"CKA between retrained models: {band['low']:.3f} to {band['high']:.3f} "
            f"({band['pairs']} pairs)"
        )
    written: list[Path] = []
    if settings.out is not None:
        facts: dict[str, Any] = {
            "request": dataclasses.asdict(comparison.request),
            "cka_band": band,
        }
        facts["notes"] = notes
        facts["left_out"] = {key: images.left_out for key, images in comparison.sets.items()}
        facts["versions"] = versions(ranks)
        written = write(settings, measuring, table, facts)
    console().close(summarize(settings, comparison, table.flat, table.left_out, written))
    if finished is not None:
        finished.remove()


def find_same_table(settings: Settings, measuring: Measuring, keep: bool) -> FinishedTable | None:
    """Find the table that this command has written before, on the first rank.

    Raises:
        InputError: the folder holds another one, which may not be overwritten.
    """
    out, main = settings.out, measuring.ranks.main
    if out is None or not main or not settings.has_table or (settings.overwrite and not keep):
        return None
    found = read_same_table(out, table_digest(measuring, settings.page))
    if found is None:
        check_free(out, settings.overwrite)
    return found


def print_table(rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
    """Print the table for people."""
    if console().prints:
        clear()
        print(as_text(prepare(rows, left_out)))


def summarize(
    settings: Settings,
    of: Comparison,
    rows: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, str],
    files: Sequence[Path],
) -> Summary:
    """Say what was measured, and where the page or the tables lie."""
    models = f"{len(rows)} model{'s' * (len(rows) != 1)}"
    done = (
        f"measured {models} that {'was' if len(rows) == 1 else 'were'} to forget {of.request.text}"
    )
    facts = {"rows": rows, "left_out": left_out, "files": [*map(str, files)]}
    page = next((path for path in files if path.suffix == ".html"), None)
    if page is not None:
        return Summary("evaluate", done, facts, page.absolute().as_uri())
    out = None if settings.out is None else str(settings.out.absolute())
    return Summary("evaluate", done, facts, out, _following(settings))


def _following(settings: Settings) -> str | None:
    """Write the command that makes the page of a folder's runs; None where nothing draws it."""
    if settings.folder is None or not draws():
        return None
    named = {one.name for one in fields(settings)} - {
        "folder", "original", "retrained", "runs", "report", "out", "overwrite"
    }  # fmt: skip
    words: list[object] = [settings.folder, *changed_options(settings, named)]
    found = find_runs(settings.folder)  # what else was named is named again
    if settings.original is not None and found.originals != (settings.original,):
        words += ["--original", settings.original]
    for flag, ours, theirs in (
        ("--retrained", settings.retrained, found.retrained),
        ("--runs", settings.runs, found.runs),
    ):
        words += [flag, *ours] if ours != theirs else []
    out = free_path(settings.folder / "table")
    return command_line("evaluate", [*words, "--report", "--out", out])


def _measuring(
    settings: Settings, of: Comparison, ranks: Ranks, finished: FinishedRows | None = None
) -> Measuring:
    conditions, extent = settings.conditions, settings.extent
    interval = SaveOptions(settings.save_every).interval
    size = settings.batch_size
    return Measuring(settings, of, conditions, extent, size, ranks, finished, interval)


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
        splits = measuring.inference.splits
        [model] = measuring.inference.open([entry])
        model = measuring.inference.place(model) if splits else model
        check_original(Look(model, loader, mask, precision, ranks, open_as))


def write(
    settings: Settings, measuring: Measuring, table: Table, facts: Mapping[str, Any]
) -> list[Path]:
    """Write the table, the report's files and what they were made under; return their paths."""
    assert settings.out is not None
    fault = None
    with replace_tables(settings.out) as folder:
        files = write_report(table.flat, folder, table.left_out, page=False)
        if settings.page:
            try:
                files = _write_page(settings, measuring, table, facts, folder)
            except Exception as error:  # whatever it is, the numbers are kept
                fault = error
        own: dict[str, Any] = {FILES: file_digests(files)}
        if fault is None:  # a table without its page is not what the command was to make
            own[ORIGIN] = table_digest(measuring, settings.page)
        durable.write(folder / MARK, json.dumps({**facts, **own}, indent=2, default=str) + "\n")
    if fault is not None:
        raise fault
    return [settings.out / path.name for path in files]


def _write_page(
    settings: Settings,
    measuring: Measuring,
    table: Table,
    facts: Mapping[str, Any],
    folder: Path,
) -> list[Path]:
    """Write the tables and the page."""
    of, now = measuring.comparison, datetime.now().astimezone()
    head = describe_comparison(of, settings.data, settings.downstream, facts["versions"], now)
    order = [row["name"] for row in select_rows(prepare(table.flat), "name")]
    show("the page: example images")
    examples = find_examples(measuring.inference, order)
    show("the page: pictures")
    return write_report(table.flat, folder, table.left_out, facts=head, examples=examples)


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
