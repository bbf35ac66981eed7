"""Relearn and attack the models of a table: shared out over the ranks, on images read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

from letheon.engine.distributed import own_items, share_out
from letheon.errors import RunFailed
from letheon.eval.attacks.result_store import Result, ResultStore
from letheon.eval.attacks.suite import IMAGES, Attack, Targets, attack
from letheon.eval.comparison import Entry
from letheon.eval.evaluate import Inference, Measuring, Table
from letheon.eval.inference.sampling import sample_rows
from letheon.eval.probes.relearn import RATES, TRIAL, feature_batches
from letheon.eval.probes.relearn_evaluator import (
    BATCH,
    Curves,
    Lesson,
    Relearning,
    curves,
    rate_of,
)
from letheon.eval.row_builder import add_stage
from letheon.loaders.preset import Preset
from letheon.progress import Items, clear

T = TypeVar("T", bound=Result)
_HELD_MOST = 1_000  # held-out images that the relearn curve is measured on


@dataclass(frozen=True)
class Lessons:
    """Reads the images that models relearn from and are attacked with, as each preset has them.

    Nothing is held here but learning rates: who asks keeps the images while it needs them.
    """

    inference: Inference
    original: Entry | None
    """The one that the models are compared with, where any has a row."""
    _rates: dict[Preset, float] = field(default_factory=dict)

    @property
    def held_rows(self) -> list[int]:
        """Sample held-out images of the forgotten classes; none where single samples were."""
        forget = torch.from_numpy(self.inference.comparison.forget_mask("test"))
        return sample_rows(forget, _HELD_MOST).tolist()

    def read_lesson(self, entry: Entry) -> Lesson:
        """Read all that this model relearns from and is tested on."""
        read, held = self.inference, self.held_rows
        rate = self.find_rate(entry)
        images, labels = self._read(entry, "train", read.balanced_rows())
        asked = self._read(entry, "test", held) if held else (images[:0], labels[:0])
        related = read.related_images(entry)
        return Lesson(images, labels, *asked, read.extent.relearn, rate, related)

    def read_targets(self, entry: Entry) -> Targets:
        """Read the few of these images that this model is attacked with."""
        read = self.inference
        rows = torch.tensor(read.balanced_rows())
        member = torch.from_numpy(read.comparison.forget_mask("train"))[rows]
        few = attack_rows(member)
        images, labels = self._read(entry, "train", rows[few].tolist())
        gone = tuple(read.comparison.request.classes)
        return Targets(
            images, labels, member[few], gone, read.extent.attacks, self.find_rate(entry)
        )

    def find_rate(self, entry: Entry) -> float:
        """Find the largest rate at which the original, where one has this preset, can go on.

        Of the lesson only the images of the trial are read, and they are let go.
        """
        read, preset = self.inference, entry.model.preset
        before = self.original
        if before is not None and before.model.preset == preset and preset not in self._rates:
            rows = torch.tensor(read.balanced_rows())
            order = feature_batches(rows, rows, BATCH, seed=0)
            steps = [order(step)[0] for step in range(TRIAL)]
            needed = torch.cat(steps).unique()
            images, labels = self._read(before, "train", needed.tolist())
            places = [torch.searchsorted(needed, numbers) for numbers in steps]
            self._rates[preset] = rate_of(
                read.open_one(before), [(images[at], labels[at]) for at in places],
                read.ranks.device, read.place,
            )  # fmt: skip
        return self._rates.get(preset, RATES[0])

    def _read(self, entry: Entry, key: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.inference.read(key, entry, rows)


def _of_rows(
    of: Measuring, table: Table, verb: str, compute: Callable[[Entry, Items], T]
) -> dict[str, T]:
    """Compute something of every model that has a row, each on one rank, or by all together where
    networks are split; all must call. What an earlier start left is not computed again."""  # noqa: D209
    store = ResultStore.open(of, verb)
    known = cast(dict[str, T], store.load() if store else {})  # of this stage alone
    entries = [e for e in of.comparison.entries if e.name not in table.left_out.keys() | known]
    alone = of.inference.splits or of.ranks.world == 1
    count = len(entries) if alone else len(own_items(len(entries), of.ranks))
    line = Items(verb, count, of.ranks.main, "" if alone else " of this rank's")

    def show_and_compute(entry: Entry) -> T:
        line.start(entry.name)
        result = compute(entry, line)
        if store is not None:
            store.save(entry.name, result)
        line.finish()
        return result

    if of.inference.splits:
        results = [show_and_compute(entry) for entry in entries]
    else:
        results = share_out(entries, show_and_compute, of.ranks)
    clear()
    return known | {entry.name: result for entry, result in zip(entries, results, strict=True)}


def measure_all(of: Measuring) -> Table:
    """Measure every model, then relearn and attack as the extent says; every rank must call.

    Raises:
        LetheonError: the first problem of any rank, on every rank.
    """
    table = of.measure()
    lessons = Lessons(of.inference, of.comparison.find_original(table.left_out))
    if of.inference.extent.relearn:
        relearn_table(of, table, lessons)
    if of.inference.extent.full and of.inference.extent.attacks:
        attack_table(of, table, lessons)
    return table


def relearn_table(of: Measuring, table: Table, lessons: Lessons) -> None:
    """Enter the relearn curves; every rank must call.

    Raises:
        LetheonError: the first problem of any rank, on every rank.
    """
    reason = None
    if of.comparison.nothing_held_out:
        reason = "nothing is held out: test is the same as train"
    elif not lessons.held_rows:
        reason = "single samples were forgotten: none of them is held out"
    if reason is not None:
        for row in table.rows:
            row.why["relearn"] = reason
        return

    known: dict[Preset, Lesson] = {}

    def learn(entry: Entry, line: Items) -> Curves | str:
        line.show("relearning curves", 1)
        preset = entry.model.preset
        lesson = known[preset] = known.get(preset) or lessons.read_lesson(entry)
        try:
            return curves(of.inference.open_one(entry), lesson, of.ranks.device, of.inference.place)
        except RunFailed as error:  # one that diverges as it learns leaves the others their curves
            return str(error)

    results = _of_rows(of, table, "relearn", learn)
    by_name = {name: result for name, result in results.items() if not isinstance(result, str)}
    before = of.comparison.find_original(table.left_out)
    original = by_name.get(before.name) if before is not None else None
    retrained = (e.name for e in of.comparison.of_role("retrained") if e.name in by_name)
    first = next((by_name[name] for name in retrained), None)
    for row in table.rows:
        if row.name not in by_name:
            row.why["relearn"] = str(results[row.name])
            continue
        reference = None if by_name[row.name] is first else first
        add_stage(row, Relearning(by_name[row.name], original, reference))


def attack_rows(member: Tensor) -> Tensor:
    """(m,) increasing positions of at most `IMAGES` images a side, keyed: of all classes."""
    return torch.cat([sample_rows(side, IMAGES) for side in (member, ~member)]).sort().values


def attack_table(of: Measuring, table: Table, lessons: Lessons) -> None:
    """Enter the attacks that run the network, on at most `IMAGES` images a side; all must call.

    Raises:
        LetheonError: the first problem of any rank, on every rank.
    """
    before = of.comparison.find_original(table.left_out)

    known: dict[Preset, Targets] = {}

    def make(entry: Entry, line: Items) -> Attack:
        preset = entry.model.preset
        targets = known[preset] = known.get(preset) or lessons.read_targets(entry)
        # One that reads images in another way cannot be asked the same.
        alike = before is not None and before.model.preset == preset
        read = of.inference
        original = read.open_one(before) if before is not None and alike else None
        return attack(read.open_one(entry), original, targets, of.ranks.device, read.place, line)

    for name, result in _of_rows(of, table, "attack", make).items():
        add_stage(next(row for row in table.rows if row.name == name), result)
