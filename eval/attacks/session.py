"""Relearn and attack the models of a table: shared out over the ranks, on images read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, share_out
from letheon.errors import RunFailed
from letheon.eval.attacks.suite import IMAGES, Attack, Targets, attack
from letheon.eval.comparison import Entry
from letheon.eval.evaluate import Inference, Measuring, Table, read_images
from letheon.eval.inference.sampling import sample_rows
from letheon.eval.probes.relearn_evaluator import Curves, Lesson, Relearning, curves, rate_of
from letheon.eval.row_builder import add_stage
from letheon.loaders.preset import Preset

T = TypeVar("T")
_HELD_MOST = 1_000  # held-out images that the relearn curve is measured on


@dataclass(frozen=True)
class Lessons:
    """Images that models relearn from; those of one preset share them, and they are read once."""

    inference: Inference
    _known: dict[Preset, tuple[Lesson, Tensor]] = field(default_factory=dict)

    @property
    def held_rows(self) -> list[int]:
        """Sample held-out images of the forgotten classes; none where single samples were."""
        forget = torch.from_numpy(self.inference.comparison.forget_mask("test"))
        return sample_rows(forget, _HELD_MOST).tolist()

    def of(self, entry: Entry) -> tuple[Lesson, Tensor]:
        """Read the lesson as this model sees it, and (n,) bool: which images are to be forgotten.

        The learning rate is the largest at which the original, where there is one, can go on.
        """
        read, preset = self.inference, entry.model.preset
        if preset not in self._known:
            alone = Ranks(device=read.ranks.device)
            rows, held = read.balanced_rows(), self.held_rows
            images, labels = read_images(read.loader("train", entry, alone), rows)
            asked = (images[:0], labels[:0])
            if held:
                asked = read_images(read.loader("test", entry, alone), held)
            related = read.related_images(entry)
            lesson = Lesson(images, labels, *asked, read.extent.relearn, related=related)
            for before in read.comparison.of_role("original")[:1]:
                if before.model.preset != preset:
                    continue
                rate = rate_of(before.model, lesson, alone.device)
                lesson = Lesson(images, labels, *asked, read.extent.relearn, rate, related)
            member = torch.from_numpy(read.comparison.forget_mask("train"))[rows]
            self._known[preset] = (lesson, member)
        return self._known[preset]


def _of_rows(of: Measuring, table: Table, compute: Callable[[Entry], T]) -> dict[str, T]:
    """Compute something of every model that has a row, each on one rank; all must call."""
    entries = [e for e in of.comparison.entries if e.name not in table.left_out]
    results = share_out(entries, compute, of.ranks)
    return {entry.name: result for entry, result in zip(entries, results, strict=True)}


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

    def learn(entry: Entry) -> Curves | str:
        lesson = lessons.of(entry)[0]
        try:
            return curves(entry.model, lesson, of.ranks.device)
        except RunFailed as error:  # one that diverges as it learns leaves the others their curves
            return str(error)

    results = _of_rows(of, table, learn)
    by_name = {name: result for name, result in results.items() if not isinstance(result, str)}
    original, first = (
        next((by_name[e.name] for e in of.comparison.of_role(role) if e.name in by_name), None)
        for role in ("original", "retrained")
    )
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
    originals = (e for e in of.comparison.of_role("original") if e.name not in table.left_out)
    before = next(originals, None)

    def make(entry: Entry) -> Attack:
        lesson, member = lessons.of(entry)
        rows = attack_rows(member)
        targets = Targets(
            lesson.images[rows], lesson.labels[rows], member[rows],
            tuple(of.comparison.request.classes), of.extent.attacks, lesson.rate,
        )  # fmt: skip
        # One that reads images in another way cannot be asked the same.
        alike = before is not None and before.model.preset == entry.model.preset
        original = before.model if before is not None and alike else None
        return attack(entry.model, original, targets, of.ranks.device)

    for name, result in _of_rows(of, table, make).items():
        add_stage(next(row for row in table.rows if row.name == name), result)
