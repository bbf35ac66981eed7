"""Evaluate: every model of a comparison through the same passes and the same metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.engine.memory.sharding import split_copy, whole_copy
from letheon.engine.models.classifier import Classifier
from letheon.engine.runs.plan import JobOptions
from letheon.engine.runs.run_folder import device_name, source_facts
from letheon.errors import InputError
from letheon.eval.case import Case, Conditions, Peers, Subject
from letheon.eval.checks import check_finite
from letheon.eval.comparison import RANDOM, Comparison, Entry
from letheon.eval.finished_rows import FinishedRow, FinishedRows
from letheon.eval.inference.networks import find_room, group_entries, work_together
from letheon.eval.inference.passes import (
    Passes,
    Store,
    SweepOptions,
    Swept,
    cache_of,
    sweep_together,
)
from letheon.eval.inference.sampling import sample_rows
from letheon.eval.inference.taps import stages
from letheon.eval.membership.over_seeds import Runs, SeveralRuns, margins
from letheon.eval.metrics.cka import cka_band
from letheon.eval.probes.critic import critic_by_layer
from letheon.eval.probes.information import BALANCED
from letheon.eval.references import Doubt, list_doubts
from letheon.eval.related_images import find_related
from letheon.eval.row_builder import Row, add_stage, build_row
from letheon.loaders.batch import Loader
from letheon.progress import Items, clear, note, show
from letheon.regular import read_text

INTERVAL = (600.0, 0)
"""Seconds and batches after which a pass whose outputs are stored is saved; 0: never by these."""
_BALANCED_MOST = 2_000  # forget images, and as many others, for IDI and for relearning


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    depth: Literal["quick", "full"] = "quick"
    """quick: accuracy, k-NN and CKA; full: also membership attacks, divergences, probes, IDI, CKA
    layer by layer, the domain matrix, confusions and weight distances."""
    relearn: int = 0
    """Steps of the relearn curves; 0 draws none."""
    attacks: int = 40
    """At full depth, steps of each attack that learns (from retain images, a prompt), with 64
    images a step; 0 makes none of the attacks that run the network."""
    related: str | None = None
    """Relearn from related images too: class:NAMES that were kept, or a folder of other images of
    the models' classes. As many retain images are learned beside them."""
    critic: Literal["linear", "layers"] = "linear"
    """IDI's critic. linear: a logistic regression; layers: the network's own later layers, trained
    for each layer and model, as the paper has it; slow."""
    groups: Path | None = None
    """Text file with the group of each training image, one name a line, in the images' order: what
    is left is told by group too."""
    cache: Path | None = None
    """Folder where outputs are kept and found again; on a file system that all ranks share."""
    flip: bool = False
    """Show each image mirrored too and average the two answers (test-time flip)."""
    shift: bool = False
    """Show each image moved by a pixel too, up and left and down and right; its own answer counts
    half (test-time shift)."""

    def __post_init__(self) -> None:
        if self.relearn < 0:
            raise InputError(
                f"got relearn {self.relearn}; expected a number of steps, or 0", option="relearn"
            )
        if self.attacks < 0:
            raise InputError(
                f"got attacks {self.attacks}; expected a number of steps, or 0", option="attacks"
            )
        if self.related is not None and not self.relearn:
            raise InputError(
                "got related images without relearning; add relearn and a number of steps",
                option="related",
            )

    @property
    def full(self) -> bool:
        """Whether all metrics are wanted."""
        return self.depth == "full"

    def check(self, of: Comparison, seed: int) -> None:
        """Refuse groups and related images that do not fit, before anything is computed.

        Raises:
            InputError: groups that cannot be read, related images that cannot be learned from.
        """
        if self.groups is not None:
            of.read_groups(self.groups)
        if self.related is not None:
            find_related(self.related, of, seed, 1)


@dataclass
class Table:
    """What an evaluation gives."""

    rows: list[Row] = field(default_factory=list)
    band: dict[str, Any] = field(default_factory=dict)  # CKA between the retrained models
    left_out: dict[str, str] = field(default_factory=dict)  # model -> why it has no row

    def enter_doubts(self, doubts: Sequence[Doubt]) -> None:
        """Enter what makes numbers worth less in the rows of the models concerned."""
        for row in self.rows:
            row.doubts = [doubt.text for doubt in doubts if row.name in doubt.names]

    @property
    def flat(self) -> list[dict[str, Any]]:
        """The rows as JSON holds them."""
        return [row.as_dict() for row in self.rows]


@dataclass(frozen=True)
class Inference:
    """Shows the sets of a comparison to its models."""

    job: JobOptions
    comparison: Comparison
    extent: Extent
    batch_size: int
    ranks: Ranks
    interval: tuple[float, int] = INTERVAL

    @property
    def splits(self) -> bool:
        """Whether each network is split over the ranks, and computed by all of them together."""
        return self.job.precision.reduction(self.ranks.world) == "shard"

    def place(self, model: Classifier) -> Classifier:
        """Copy a network to this rank's device, frozen, in evaluation mode; or, where networks are
        split, this rank's part of it."""  # noqa: D205, D209
        if self.splits:
            return split_copy(model, self.ranks)
        return whole_copy(model, self.ranks.device)

    def groups(self, entries: Sequence[Entry], world: int = 0) -> list[list[Entry]]:
        """Divide models into those swept together, the same on every rank; for `world` ranks."""
        world = world or self.ranks.world
        if self.job.precision.reduction(world) == "shard":
            return [[entry] for entry in entries]
        sizes = [len(images) for images in self.comparison.sets.values()]
        cached = self.extent.cache is not None  # on disk, but for this rank's part of one set
        images = -(-(max(sizes) if cached else sum(sizes)) // world)
        return group_entries(entries, images, find_room(self.ranks))

    def open(self, entries: Sequence[Entry]) -> list[Classifier]:
        """Open networks on this rank's host; every rank must call.

        Raises:
            InputError: one of any rank cannot be read, on every rank.
        """
        return work_together(lambda: [entry.open() for entry in entries], self.ranks)

    def open_one(self, entry: Entry) -> Classifier:
        """Open a network; every rank must call where networks are split, and gets any's error."""
        return self.open([entry])[0] if self.splits else entry.open()

    def sweep(self, entries: Sequence[Entry]) -> list[Passes]:
        """Run these models over all sets, with their layers at full depth.

        Networks are opened here and let go, and not opened where all of their outputs are stored.
        """
        ranks, extent, of = self.ranks, self.extent, self.comparison
        loaders = {key: self.loader(key, entries[0], ranks) for key in of.sets}
        parts: dict[str, list[int]] = {}
        if extent.full:
            loaders[BALANCED] = loaders["train"]
            parts[BALANCED] = self.balanced_rows()
        options = self._options(parts)
        if options.store is not None:
            origin = {"batch": self.batch_size, "loader": self.job.loader, **source_facts()}
            options = replace(options, store=replace(options.store, origin=origin))
        new = [e for e in entries if not all(self.is_stored(e, key, options) for key in loaders)]
        names, opened = [entry.name for entry in new], self.open(new)
        if self.splits:  # one network, of which this rank's part alone is kept
            opened = [self.place(opened.pop()) for _ in names]
        networks = dict(zip(names, opened, strict=True))
        swept = [self._swept(entry) for entry in entries]
        swept = [each._replace(model=networks.get(each.name, each.model)) for each in swept]
        try:
            for model in opened:
                model.to(ranks.device)
            return sweep_together(swept, loaders, ranks, options)
        finally:
            for model in opened if not self.splits else ():
                model.to("cpu")

    def is_stored(self, entry: Entry, key: str, options: SweepOptions | None = None) -> bool:
        """Tell whether this model's outputs on a set are there; equal on every rank."""
        model, options = self._swept(entry), options or self._options({})
        cache = cache_of(model, options.store, key)
        return cache is not None and cache.is_stored(self.ranks, options.of_set(key, model.taps))

    def _swept(self, entry: Entry) -> Swept:
        taps = stages(entry.model) if self.extent.full else ()
        return Swept(entry.name, entry.model, entry.weights, taps)

    def _options(self, parts: Mapping[str, Sequence[int]]) -> SweepOptions:
        precision = self.job.precision.resolve(self.ranks.device)
        flip, shift = self.extent.flip, self.extent.shift
        return SweepOptions(
            precision, flip, shift, parts, _store_of(self.comparison, self.extent, self.interval)
        )

    def subjects(self, entries: Sequence[Entry]) -> dict[str, Subject | InputError]:
        """Name -> model with its passes; an error in its place where outputs are not finite."""
        subjects: dict[str, Subject | InputError] = {}
        for passes, entry in zip(self.sweep(entries), entries, strict=True):
            try:
                check_finite(passes)
            except InputError as error:
                subjects[entry.name] = error
            else:
                if self.extent.full and self.extent.critic == "layers":
                    passes.keep("information", self._critic_information(entry))
                runs = entry.together
                subjects[entry.name] = Subject(passes, entry.open, entry.seconds, runs)
        return subjects

    def _critic_information(self, entry: Entry) -> dict[str, float]:
        rows = self.balanced_rows()
        images, _ = self.read("train", entry, rows)
        member = torch.from_numpy(self.comparison.forget_mask("train"))[rows]
        [model] = self.open([entry])
        return critic_by_layer(model, stages(model), images, member, self.ranks)

    def loader(self, key: str, entry: Entry, ranks: Ranks) -> Loader:
        """Open a set as this model reads it."""
        images, preset = self.comparison.sets[key], entry.model.preset
        mask = self.comparison.forget_mask(key)
        return self.job.loader_of(images, mask, preset, self.batch_size, ranks)

    def read(self, key: str, entry: Entry, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read images and labels of these samples, as this model has them, to this rank's host.

        Raises:
            InputError: one cannot be read; on every rank, where networks are split.
        """
        alone = Ranks(device=self.ranks.device)
        return _read(lambda: self.loader(key, entry, alone), rows, self)

    def balanced_rows(self) -> list[int]:
        """Sample forget images, and as many others; the same for every model."""
        forget = torch.from_numpy(self.comparison.forget_mask("train"))
        least = min(int(forget.sum()), int((~forget).sum()), _BALANCED_MOST)
        sides = [sample_rows(forget, least), sample_rows(~forget, least)]
        return torch.cat(sides).sort().values.tolist()

    def related_images(self, entry: Entry) -> tuple[Tensor, Tensor] | None:
        """Read images and labels to relearn from besides the forgotten ones, where wanted."""
        of, alone = self.comparison, Ranks(device=self.ranks.device)
        if self.extent.related is None:
            return None
        parts = []
        for source in find_related(self.extent.related, of, self.job.seed, _BALANCED_MOST):
            none = np.zeros(len(source.images), dtype=bool)
            open_loader = partial(
                self.job.loader_of, source.images, none, entry.model.preset, self.batch_size, alone
            )
            images, labels = _read(open_loader, source.indices, self)
            parts.append((images, source.numbers[labels]))
        return torch.cat([images for images, _ in parts]), torch.cat([y for _, y in parts])


def _store_of(of: Comparison, extent: Extent, interval: tuple[float, int]) -> Store | None:
    if extent.cache is None:
        return None
    sets = {}
    for key, one in of.sets.items():
        mask = of.forget_mask(key).tobytes()
        digest = hashlib.sha256(one.digest.encode() + mask).hexdigest()
        sets[key] = (digest, len(one))
    images = {key: one.digest for key, one in of.sets.items()}
    return Store(
        extent.cache, {**sets, BALANCED: sets["train"]},
        {**images, BALANCED: images["train"]}, interval=interval,
    )  # fmt: skip


@dataclass(frozen=True)
class Measuring:
    """One evaluation; every rank must call, and gets the same."""

    job: JobOptions
    comparison: Comparison
    conditions: Conditions
    extent: Extent
    batch_size: int
    ranks: Ranks
    finished: FinishedRows | None = None
    """Where rows are kept until the table is whole, and found again; None keeps none."""
    interval: tuple[float, int] = INTERVAL

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.inference.splits and self.extent.full and self.extent.critic == "layers":
            refusal = InputError(
                "got critic layers with reduce shard; it trains layers of the network apart, whole "
                "on one device; use critic linear",
                option="critic",
            )
            refusal.everywhere = True
            raise refusal

    @property
    def inference(self) -> Inference:
        """What runs the models."""
        known = (self.job, self.comparison, self.extent, self.batch_size, self.ranks)
        return Inference(*known, self.interval)

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of each training image; empty where none are named."""
        file = self.extent.groups
        return () if file is None else self.comparison.read_groups(file)

    def measure(self) -> Table:
        """Measure every model; one whose outputs are not finite is left out with the reason.

        Raises:
            InputError: no model can be measured.
        """
        entries = self.comparison.entries
        references = _references(self.comparison)
        table = Table(left_out=dict(self.comparison.left_out))
        subjects: dict[str, Subject] = {}
        waiting, known = list(entries), {}
        facts = self.row_facts() if self.finished and self.ranks.main else {}
        finished = self.finished.load(facts) if self.finished else {}
        skipped = finished.keys() - {entry.name for entry in references}
        rest = [entry for entry in entries if entry.name not in skipped]
        peers: Peers | None = None
        line = Items("measure", len(entries) - len(finished), self.ranks.main)
        if finished and self.ranks.main:
            note(f"rows of an earlier start: {', '.join(finished)}")
        for group in self.inference.groups(rest) or [[]]:
            for name, subject in self.inference.subjects(group).items() if group else ():
                if isinstance(subject, Subject):
                    subjects[name] = subject
                else:
                    table.left_out[name] = str(subject)
            ready = subjects.keys() | table.left_out.keys() | skipped
            if any(entry.name not in ready for entry in references):
                continue
            peers = peers or self._peers(subjects)
            while waiting and waiting[0].name in ready:
                entry = waiting.pop(0)
                if entry.name in table.left_out:
                    continue
                done = finished.get(entry.name)
                if done is None:
                    done = self._finish(entry, subjects[entry.name], peers, line)
                    if self.finished:
                        self.finished.save(facts.get(entry.name, {}), done.row, done.margins)
                table.rows.append(done.row)
                if done.margins is not None:
                    known[entry.name] = done.margins
                if entry not in references:
                    subjects.pop(entry.name, None)
        if not table.rows:
            raise InputError("; ".join(table.left_out.values()))
        self._add_runs(table.rows, known)
        table.enter_doubts(list_doubts(self.comparison))
        retrained = [subject.passes for subject in peers.retrained] if peers else []
        table.band = cka_band(retrained, self.ranks)
        clear()
        return table

    def row_facts(self) -> dict[str, dict[str, Any]]:
        """Name -> what the row of a model depends on; asks the size of every file of the images."""
        read, entries = self.inference, self.comparison.entries
        return {entry.name: _facts(read, self.conditions, entry) for entry in entries}

    def _peers(self, subjects: dict[str, Subject]) -> Peers:
        of = self.comparison
        original = of.find_original({e.name for e in of.entries} - subjects.keys())

        def in_role(role: str) -> tuple[Subject, ...]:
            names = [entry.name for entry in of.of_role(role)]
            return tuple(subjects[name] for name in names if name in subjects)

        untrained = subjects.get(RANDOM)
        return Peers(
            subjects[original.name] if original else None, in_role("retrained"),
            untrained.passes if untrained else None,
            tuple(of.request.classes), tuple(of.data.classes), of.nothing_held_out, of.canaries,
            self.groups, of.request.text,
        )  # fmt: skip

    def _finish(self, entry: Entry, subject: Subject, peers: Peers, line: Items) -> FinishedRow:
        case = Case(subject, peers, self.conditions, self.ranks)
        row = build_row(case, self.extent.depth, Row(entry.name, entry.role, entry.seed), line)
        if not self.extent.full:
            return FinishedRow(row)
        row.limits["critic"] = self.extent.critic
        return FinishedRow(row, margins(subject.passes))

    def _add_runs(self, rows: Sequence[Row], known: dict[str, Tensor]) -> None:
        """Compute what needs several runs of a method, in the row of each run."""
        if not known:
            return
        by_name = {row.name: row for row in rows}

        def runs(entries: Sequence[Entry]) -> Runs:
            of = [by_name[entry.name] for entry in entries if entry.name in by_name]
            means = {}
            for key in ("RA", "TRA"):
                shares = [row.values[key] for row in of if row.values[key] is not None]
                means[key] = fmean(shares) if shares else None
            return Runs([known[row.name] for row in of], means)

        of = self.comparison
        originals = [entry for entry in of.of_role("original") if entry.name in known]
        for entry in of.entries:
            before = [known[other.name] for other in originals if other is not entry]
            if entry.name not in by_name or (entry.role == "original" and not before):
                continue
            alike = [other for other in of.of_role(entry.role) if other.settings == entry.settings]
            # An original or retrained model is audited as if it were unlearned; of a model without
            # settings nobody knows whether another is of the same method.
            if entry.role in ("original", "retrained") or not entry.settings:
                alike = [entry]
            # A copy under another name is no other seed.
            alike = list({other.seed: other for other in (*alike, entry)}.values())
            retrained = [other for other in of.of_role("retrained") if other is not entry]
            if self.ranks.main:
                show(f"compare the runs of all seeds: {entry.name}")
            inputs = SeveralRuns(runs(alike), runs(retrained), known[entry.name], before)
            add_stage(by_name[entry.name], inputs)


def _identity(entry: Entry) -> list[Any]:
    """What a model's answers depend on: its weights, architecture and preset."""
    preset = asdict(entry.model.preset)
    return [entry.name, entry.role, entry.weights, entry.model.name, preset]


def _facts(read: Inference, conditions: Conditions, entry: Entry) -> dict[str, Any]:
    """Collect what the row of a model depends on."""
    of, sets = read.comparison, {}
    for key, images in of.sets.items():
        mask = hashlib.sha256(of.forget_mask(key).tobytes()).hexdigest()
        sets[key] = [images.digest, len(images), mask]
    return {
        "model": [*_identity(entry), entry.seed, entry.seconds],
        "together": entry.together, "sets": sets, "request": asdict(of.request),
        "references": [_identity(e) for e in _references(of)],
        "conditions": asdict(conditions),
        "extent": [read.extent.depth, read.extent.critic, read.extent.flip]
        + (["shift"] if read.extent.shift else [])
        + ([read_text(read.extent.groups)] if read.extent.groups else []),
        "dtype": read.job.precision.resolve(read.ranks.device).dtype,
        "batch": read.batch_size, "loader": read.job.loader,
        "device": [read.ranks.device.type, device_name(read.ranks)], **source_facts(),
    }  # fmt: skip


def _references(of: Comparison) -> list[Entry]:
    """Select the models that the others are compared with; they come first."""
    return [e for e in of.entries if e.role in ("original", "retrained") or e.name == RANDOM]


def _read(
    open_loader: Callable[[], Loader], rows: Sequence[int], of: Inference
) -> tuple[Tensor, Tensor]:
    """Read samples; where networks are split an error of one rank is one of all."""
    if not of.splits:
        return read_images(open_loader(), rows)
    return work_together(lambda: read_images(open_loader(), rows), of.ranks)


def read_images(loader: Loader, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Read (n, 3, H, W) float32 images and (n,) labels of these samples, to the host."""
    batches = list(loader.sweep(indices))
    images = torch.cat([batch.images.cpu().float() for batch in batches])
    return images, torch.cat([batch.labels.cpu() for batch in batches])
