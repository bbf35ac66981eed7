"""One phase of one epoch: begun, fed all its batches, closed, or rolled back and done again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from torch import Tensor

from letheon.engine.checkpoints.loop_state import Course, restore
from letheon.engine.distributed import gather_objects, sum_over_ranks
from letheon.engine.health import explain_step
from letheon.engine.method import Phase, Run
from letheon.engine.models.batch_norm import average_batch_norm, freezes_batch_norm, set_mode
from letheon.engine.numbers.nonfinite import LossWatch, Nonfinite, leave_out, report, report_first
from letheon.engine.numbers.tally import Tally, audit
from letheon.engine.ranks.watch import PLACE
from letheon.engine.runs.progress import EpochPart, Progress, Shown
from letheon.engine.step import Step
from letheon.loaders.batch import Batch, Loader, Stream
from letheon.spans import span

if TYPE_CHECKING:
    from letheon.engine.checkpoints.saver import Saver

Log = Callable[..., None]
"""Called as log(kind, **numbers); a no-op on all ranks but the first."""


class Pass:
    """One phase of one epoch: it is begun, fed all its batches and closed."""

    def __init__(
        self,
        run: Run,
        step: Step,
        phase: Phase,
        epoch: int,
        part: EpochPart,
        log: Log,
        sources: Mapping[str, Loader],
    ):
        self.run, self.step, self.phase, self.log = run, step, phase, log
        self.epoch = epoch
        self.part = part
        self.loader = sources.get(phase.source, run.loader)
        self.stream = run.stream(phase)
        self.steps = self.loader.steps(self.stream)
        self.together = 1  # runs that are fed in this pass
        self.losses: dict[str, float] = {}  # mean loss by phase, once it is closed
        self._tallies = [Tally(phase, self.steps)]
        if phase.beside is not None:
            self._tallies.append(Tally(phase.beside, -(-self.steps // phase.every)))
        self._sources = sources
        self._saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.skip = 0  # steps that were taken before the run was stopped
        self.watch = LossWatch(self, self._tallies)
        self.bad: Nonfinite = {}  # steps that an earlier turn has found, and this one leaves out

    @property
    def shareable(self) -> bool:
        """True where its batches are those of one stream of the training set."""
        return self.phase.source == "train" and self.phase.beside is None

    def batches(self) -> Iterator[tuple[Batch, Batch | None]]:
        """This rank's batches of the phase, each with that of the phase beside it."""
        main = self.loader.train(self.stream, self.epoch, self.skip)
        if self.phase.beside is None:
            yield from zip(main, repeat(None), strict=False)
            return
        loader, stream = _reading(self, 1)
        others = loader.train(stream, self.epoch, -(-self.skip // self.phase.every))
        for position, batch in enumerate(main, self.skip):
            yield batch, next(others) if position % self.phase.every == 0 else None
        assert next(others, None) is None

    def begin(self) -> None:
        """Before the first batch."""
        set_mode(self.run, self.phase)
        for tally in self._tallies:
            tally.start(self.run)
        self.compiled = self.step.compile_seconds
        self.progress = _progress(self)
        self.started = time.perf_counter()
        for number, tally in enumerate(self._tallies):
            tally.ask_for_rows(*_reading(self, number), self.epoch)
        if self._saved is not None:
            _continue(self, self._tallies, *self._saved)
            self._saved = None

    @property
    def position(self) -> int:
        """Steps taken, those before the run was stopped among them."""
        return getattr(self._tallies[0], "position", self.skip)

    @property
    def doomed(self) -> bool:
        """Whether the pass has met a bad step for which it will be rolled back; waits."""
        rolls = self.run.recipe.on_nonfinite == "rollback"
        return rolls and any(tally.list_bad() for tally in self._tallies)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's tensors in the middle of the pass, and values that are ready for JSON.

        Only the first rank's values are complete: it alone writes lines of progress.
        """
        return self._saved or _collect(self, self._tallies)  # saved: not begun again yet

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on where `state_dict` was asked, once the pass begins."""
        self._saved = (tensors, values)
        self.skip = values["tallies"][0]["position"]
        self.bad = {int(number): steps for number, steps in values.get("bad", {}).items()}

    @span("compute")
    def take(self, batch: Batch, other: Batch | None = None) -> None:
        """One optimization step on this rank's part of the next global batch.

        `other` is that of the phase beside, which takes a step of its own after it.
        """
        PLACE.start_step(f"phase {self.phase.name} of epoch {self.epoch}")
        tallies = iter(self._tallies)
        for number, part in enumerate((batch, other)):
            if part is not None:
                tally = next(tallies)
                if tally.position in self.bad.get(number, ()):
                    tally.position += 1
                else:
                    self._take(tally, tally.attach_rows(part.to(self.run.ranks.device)))

    def _take(self, tally: Tally, batch: Batch) -> None:
        run, phase = self.run, tally.phase
        if len(self._tallies) > 1:
            set_mode(run, phase)
        moment = self.epoch + tally.position / tally.steps
        tally.rate = self.step.method.rate(run, phase.slot, moment)
        with explain_step(run, phase, batch):
            loss = self.step.take(phase, batch, tally.rate)
        of_forget = run.forget[batch.index].sum() if phase.source == "train" else None
        tally.add(loss, batch, of_forget, self.step.bad)
        if self.progress is not None and tally is self._tallies[0]:
            self.progress.step(tally.position, tally.sums, tally.rate)

    def samples(self, number: int, position: int) -> list[int]:
        """Numbers of the samples of a step of this pass (1: of the phase beside it), all ranks'.

        They follow from seed, epoch and position. Every rank must call.
        """
        loader, stream = _reading(self, number)
        batch = next(iter(loader.train(stream, self.epoch, position)))
        everyone = gather_objects(batch.index.tolist(), self.run.ranks)
        return [index for own in everyone for index in own]

    def shown(self, name: str = "") -> Shown:
        """What the line of progress shows of it; `name` is that of one of several runs."""
        phase, epochs, tally = self.phase.name, self.run.recipe.epochs, self._tallies[0]
        taken = (self.part.end - self.part.begin) * self.skip / self.steps
        part = self.part._replace(begin=self.part.begin + taken)
        return Shown(name, phase, self.epoch, epochs, part, lambda: tally.sums, self.losses)

    def close(self) -> None:
        """After the last batch: one look at what they added up to."""
        compiling = self.step.compile_seconds - self.compiled
        if self.progress is not None:
            self.progress.read()
        for tally in self._tallies:
            sum_over_ranks([tally.sums, *tally.counts], self.run.ranks)
            tally.record(self.run)
        for number, tally in enumerate(self._tallies):
            bad = sorted({*self.bad.get(number, ()), *tally.list_bad()})
            report(self, number, tally.phase.name, bad)
        if not all(freezes_batch_norm(self.run, tally.phase) for tally in self._tallies):
            idle = any(tally.phase.name in self.step.idle for tally in self._tallies)
            parts = sum(tally.parts for tally in self._tallies)
            average_batch_norm(self.run, parts if idle else None)
        for number, tally in enumerate(self._tallies):
            _close(self, number, tally, compiling)


def _reading(one: Pass, number: int) -> tuple[Loader, Stream]:
    """What the phase (1: the one beside it) reads, and from where."""
    phase = one._tallies[number].phase
    stream, loader = one.run.stream(phase), one._sources.get(phase.source, one.run.loader)
    return loader, stream._replace(share=1.0, steps=one._tallies[1].steps) if number else stream


def goes_back(one: Pass, course: Course, saver: Saver | None) -> bool:
    """After the last batch: whether the pass is to be done again, from the course's anchor."""
    if one.run.recipe.on_nonfinite != "rollback":
        return False
    bad = leave_out(one.bad, [tally.list_bad() for tally in one._tallies], one.skip)
    if bad == one.bad:
        return False
    assert course.anchor is not None
    one.bad = bad
    course.now = None
    one.step.optimizers.clear()  # those that this pass has made; the others are restored
    restore(course, course.anchor)
    if saver is not None:
        saver.cut_log(course.anchor)
    return True


def _close(one: Pass, number: int, tally: Tally, compiling: float) -> None:
    run, phase = one.run, tally.phase
    total, samples, forget, retain = tally.sums.tolist()
    elapsed = time.perf_counter() - one.started - compiling
    mean = total / samples if samples else math.nan
    one.losses[phase.name] = mean
    one.log(
        "phase",
        epoch=one.epoch,
        phase=phase.name,
        reads=phase.reads,
        loss=mean if math.isfinite(mean) else str(mean),
        forget_read=int(forget),
        retain_read=int(retain),
        lr=tally.rate,
        dtype=run.precision.dtype,
        seconds=elapsed,
        compile_seconds=compiling,
        images_per_second=samples / elapsed,
        **({"together": one.together} if one.together > 1 else {}),
        **({"source": phase.source} if phase.source != "train" else {}),
    )
    audit(phase, int(forget), int(retain))
    if not math.isfinite(mean):
        report_first(one, number, tally, mean)


def _progress(one: Pass) -> Progress | None:
    """Lines while the pass runs, where the recipe asks for them: the first rank's samples."""
    if not one.run.recipe.log_every or not one.run.ranks.main:
        return None
    write = partial(one.log, "steps", epoch=one.epoch, phase=one.phase.name)
    return Progress(one.run.recipe.log_every, write)


def _collect(one: Pass, tallies: list[Tally]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `_continue` gives back to a pass."""
    parts = [tally.state_dict(f"{k}.") for k, tally in enumerate(tallies)]
    if one.progress is not None:
        one.progress.read()
    return {name: tensor for tensors, _ in parts for name, tensor in tensors.items()}, {
        "tallies": [values for _, values in parts],
        "progress": None if one.progress is None else list(one.progress.before),
        "seconds": time.perf_counter() - one.started,
        "compiling": one.step.compile_seconds - one.compiled,
        **({"bad": {str(k): v for k, v in one.bad.items()}} if one.bad else {}),
    }


def _continue(
    one: Pass, tallies: list[Tally], tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Give a pass that has begun again the sums and clocks it was stopped with."""
    for k, tally in enumerate(tallies):
        tally.load_state_dict(tensors, values["tallies"][k], f"{k}.")
    if one.progress is not None and values["progress"] is not None:
        one.progress.before = (values["progress"][0], values["progress"][1])
    one.started -= values["seconds"]
    one.compiled -= values["compiling"]
