"""The rows of a comparison: every model through the same passes and the same metrics."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows
from letheon.engine.runs.plan import JobOptions
from letheon.errors import InputError
from letheon.eval.comparison import Comparison, Entry, grouped
from letheon.eval.full_row import Beside, Subject, audit
from letheon.eval.inference.layer_cka import stages
from letheon.eval.inference.passes import Store, Swept, sweep_together
from letheon.eval.membership.evaluator import some
from letheon.eval.membership.over_seeds import Runs, ensemble, margins
from letheon.eval.probes.critic import through_layers
from letheon.eval.probes.evaluator import BALANCED, check_finite
from letheon.eval.probes.relearn_evaluator import Lesson, curves, told
from letheon.eval.quick_row import Conditions, cka_band, measure
from letheon.eval.related_images import related
from letheon.loaders.batch import Loader

_BALANCED_MOST = 2_000  # forget images, and as many others, for IDI and for relearning
_HELD_MOST = 1_000  # held-out images that the relearn curve asks
_ITSELF = "this is the reference itself"


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    depth: Literal["quick", "full"] = "quick"
    """quick: accuracy, k-NN and CKA; full: also membership attacks, divergences, probes, IDI, CKA
    layer by layer, the domain matrix, confusions and weight distances."""
    relearn: int = 0
    """Steps of the relearn curves; 0 draws none."""
    related: str | None = None
    """Relearn from related images too: class:NAMES that were kept, or a folder of other images of
    the models' classes. As many retain images are learned beside them."""
    critic: Literal["linear", "layers"] = "linear"
    """IDI's critic. linear: a logistic regression; layers: the network's own later layers, trained
    for each layer and model, as the paper has it; slow."""
    cache: Path | None = None
    """Folder where outputs are kept and found again; on a file system that all ranks share."""

    flip: bool = False
    """Show each image mirrored too and average the two answers (test-time flip)."""

    def __post_init__(self) -> None:
        if self.relearn < 0:
            raise InputError(f"got --relearn {self.relearn}; expected a number of steps, or 0")
        if self.related is not None and not self.relearn:
            raise InputError("got --related without --relearn; add --relearn and a number of steps")

    @property
    def full(self) -> bool:
        """Whether all metrics are wanted."""
        return self.depth == "full"


@dataclass(frozen=True)
class Measuring:
    """One evaluation; every rank must call, and gets the same, but for relearning."""

    job: JobOptions
    comparison: Comparison
    conditions: Conditions
    extent: Extent
    batch_size: int
    ranks: Ranks

    def rows(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """One row per model, and the band of CKA between the retrained ones."""
        of = self.comparison
        references = [
            entry
            for entry in of.entries
            if entry.role in ("original", "retrained") or entry.name == "random"
        ]  # they come first
        subjects: dict[str, Subject] = {}
        waiting, groups = list(of.entries), self._groups()
        rows, known = [], {}
        beside: Beside | None = None
        for group in groups:
            subjects |= zip([entry.name for entry in group], self._subjects(group), strict=True)
            if any(entry.name not in subjects for entry in references):
                continue
            beside = beside or self._beside({e.name: subjects[e.name] for e in references})
            while waiting and waiting[0].name in subjects:
                entry = waiting.pop(0)
                subject = subjects[entry.name]
                rows.append(self._row(entry, subject, beside))
                if self.extent.full:
                    known[entry.name] = margins(subject.passes)
                if entry not in references:
                    del subjects[entry.name]
        self._of_methods(rows, known)
        retrained = [subjects[entry.name].passes for entry in of.of_role("retrained")]
        return rows, cka_band(retrained, self.ranks)

    def _beside(self, kept: Mapping[str, Subject]) -> Beside:
        of = self.comparison

        def first(role: str) -> Subject | None:
            return next((kept[e.name] for e in of.of_role(role) if e.name in kept), None)

        untrained = first("control")
        return Beside(
            first("original"),
            tuple(kept[entry.name] for entry in of.of_role("retrained")),
            untrained.passes if untrained else None, of.request.classes, of.data.classes,
        )  # fmt: skip

    def _groups(self) -> list[list[Entry]]:
        """Models to be swept together; the same on every rank."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = int(gather_rows(torch.tensor([memory // (8 * here)]), self.ranks).min())
        sizes = [len(images) for images in self.comparison.sets.values()]
        kept = self.extent.cache is not None  # on disk, but for this rank's part of one set
        images = max(sizes) // self.ranks.world if kept else sum(sizes)
        return grouped(self.comparison.entries, images, room)

    def _row(self, entry: Entry, subject: Subject, beside: Beside) -> dict[str, Any]:
        check_finite(subject.passes)
        first = beside.retrained[0] if beside.retrained else None
        full = self.extent.full
        row = measure(
            subject.passes,
            beside.original.passes if beside.original else None,
            first.passes if first else None,
            replace(self.conditions, matrix=True) if full else self.conditions,
            self.ranks,
        )
        if full:
            more = audit(subject, beside, self.ranks)
            more["audit"]["critic"] = self.extent.critic
            row |= {**more, "why": row["why"] | more["why"]}
        if entry.together > 1:
            row["why"]["seconds"] = (
                f"{entry.together} runs were trained together, and the clock counts the others' "
                "steps; run it alone for its time"
            )
        if subject is first:
            _blank(row, several=len(beside.retrained) > 1)
        return {
            "name": entry.name,
            "role": entry.role,
            "seed": entry.seed,
            "seconds": entry.seconds,
            "classes": list(beside.names),
            "forgotten": list(beside.forgotten),
            **row,
        }

    def _of_methods(self, rows: Sequence[dict[str, Any]], known: dict[str, Tensor]) -> None:
        """What needs several runs of a method, in the row of each run."""
        if not known:
            return
        by_name = {row["name"]: row for row in rows}

        def runs(entries: Sequence[Entry]) -> Runs:
            of = [by_name[entry.name] for entry in entries]
            means = {}
            for key in ("RA", "TRA"):
                shares = [row[key] for row in of if row[key] is not None]
                means[key] = fmean(shares) if shares else None
            return Runs([known[entry.name] for entry in entries], means)

        retrained = runs(self.comparison.of_role("retrained"))
        for entry, row in zip(self.comparison.entries, rows, strict=True):
            if entry.role not in ("unlearned", "control"):
                continue
            alike = [
                other
                for other in self.comparison.of_role(entry.role)
                if other.settings == entry.settings
            ]
            found = ensemble(runs(alike), retrained)
            row |= {**found.values, "why": row["why"] | found.why}

    def _subjects(self, entries: Sequence[Entry]) -> list[Subject]:
        """The models' passes over all sets, with the layers where they are wanted."""
        ranks, extent, of = self.ranks, self.extent, self.comparison
        first = entries[0]
        loaders: dict[str, Loader] = {key: self._reader(key, first, ranks) for key in of.sets}
        parts: dict[str, list[int]] = {}
        if extent.full:
            loaders[BALANCED] = loaders["train"]
            parts[BALANCED] = self._balanced()
        swept = []
        for entry in entries:
            taps = stages(entry.model) if extent.full else ()
            swept.append(Swept(entry.name, entry.model.to(ranks.device), entry.weights, taps))
        precision = self.job.precision.resolve(ranks.device)
        passes = sweep_together(swept, loaders, ranks, precision, self._store(), parts, extent.flip)
        subjects = []
        for own, each in zip(passes, swept, strict=True):
            if extent.full and extent.critic == "layers":
                rows, alone = self._balanced(), Ranks(device=ranks.device)
                images, _ = _read(self._reader("train", first, alone), rows)
                member = torch.from_numpy(of.told("train"))[rows]
                own.information |= through_layers(each.model, each.taps, images, member, ranks)
            each.model.to("cpu")
            subjects.append(Subject(own, each.model))
        return subjects

    def _reader(self, key: str, entry: Entry, ranks: Ranks) -> Loader:
        images, preset = self.comparison.sets[key], entry.model.preset
        return self.job.loader_of(images, self.comparison.told(key), preset, self.batch_size, ranks)

    def _store(self) -> Store | None:
        if self.extent.cache is None:
            return None
        sets = {}
        for key, images in self.comparison.sets.items():
            mask = self.comparison.told(key).tobytes()
            digest = hashlib.sha256(images.digest.encode() + mask).hexdigest()
            sets[key] = (digest, len(images))
        return Store(self.extent.cache, {**sets, BALANCED: sets["train"]})

    def _balanced(self) -> list[int]:
        """Forget images, and as many others; the same for every model."""
        forget = torch.from_numpy(self.comparison.told("train"))
        least = min(int(forget.sum()), int((~forget).sum()), _BALANCED_MOST)
        return torch.cat([some(forget, least), some(~forget, least)]).sort().values.tolist()

    def relearned(self, rows: Sequence[dict[str, Any]]) -> None:
        """Enter the relearn curves; for one rank alone, the others need not wait."""
        of, alone = self.comparison, Ranks(device=self.ranks.device)
        asked = some(torch.from_numpy(of.told("test")), _HELD_MOST).tolist()
        if not asked:
            for row in rows:
                row["why"]["relearn"] = "single samples were forgotten: none of them is held out"
            return
        found = {}
        for entry in of.entries:
            images, labels = _read(self._reader("train", entry, alone), self._balanced())
            held = _read(self._reader("test", entry, alone), asked)
            lesson = Lesson(images, labels, *held, self.extent.relearn, self._related(entry))
            found[entry.name] = curves(entry.model, lesson, alone.device)
        original, first = (
            next((found[entry.name] for entry in of.of_role(role)), None)
            for role in ("original", "retrained")
        )
        for row in rows:
            reference = None if found[row["name"]] is first else first
            row |= told(found[row["name"]], original, reference)

    def _related(self, entry: Entry) -> tuple[Tensor, Tensor] | None:
        """Images and labels to relearn from besides the forgotten ones, where they are wanted."""
        of, alone = self.comparison, Ranks(device=self.ranks.device)
        if self.extent.related is None:
            return None
        parts = []
        for source in related(self.extent.related, of, self.job.seed, _BALANCED_MOST):
            none = np.zeros(len(source.images), dtype=bool)
            loader = self.job.loader_of(
                source.images, none, entry.model.preset, self.batch_size, alone
            )
            images, labels = _read(loader, source.indices)
            parts.append((images, source.numbers[labels]))
        return torch.cat([images for images, _ in parts]), torch.cat([y for _, y in parts])


def _read(loader: Loader, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images and labels of these samples, on the host."""
    batches = list(loader.sweep(indices))
    images = torch.cat([batch.images.cpu().float() for batch in batches])
    return images, torch.cat([batch.labels.cpu() for batch in batches])


def _blank(row: dict[str, Any], several: bool) -> None:
    """A model compared with itself says nothing of the spread between retrained models."""
    layered = ("cka_by_layer", "cka_floor_by_layer")
    for key in list(row):
        if key in layered or (several and (key == "gap" or key.startswith("cka_retrained"))):
            row[key] = None
            row["why"][key] = _ITSELF
    for key in layered:
        row.pop(key, None)
