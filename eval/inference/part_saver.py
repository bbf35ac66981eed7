"""Parts of an inference pass on disk while it runs, so that one that was stopped goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from letheon.engine.checkpoints.run_state import RunState, StateFolder, problem_of
from letheon.engine.distributed import Ranks
from letheon.engine.runs.stop import GO_ON, STOP, Poll, defer, signals_wait, stop
from letheon.progress import note


class PartSaver:
    """Saves the answers of several models to one set, part after part; each rank its own.

    A part is some whole batches. The ranks exchange nothing: a sweep gives each rank its share of
    the samples, batch by batch, and the answers to a batch depend on nothing before it.

    Attributes:
        positions: batches of each model whose answers are on disk, or have been loaded.
    """

    def __init__(
        self, folders: Sequence[Path], origin: Mapping[str, Any], ranks: Ranks, poll: Poll
    ) -> None:
        """Prepare to load and to save; nothing is read or written yet.

        Args:
            folders: one a model, each named by all that its answers depend on but for rounding.
            origin: what their rounding depends on, such as the cut into batches; ready for JSON.
            ranks: the job.
            poll: of this rank alone; says after which batch to save.
        """
        own = f"{ranks.rank}-of-{ranks.world}"
        self._folders = [StateFolder(folder / own, limit=None) for folder in folders]
        self._origin: dict[str, Any] = json.loads(json.dumps(origin))
        self._poll, self._main = poll, ranks.main
        self._saves, self._before = True, False  # before: whether signals waited
        self.positions = [0] * len(folders)

    def load(self, number: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield what is on disk of a model: samples of the whole pass, and columns of rows."""
        folder, damaged = self._folders[number], list[str]()

        def follows(facts: Mapping[str, Any]) -> bool:
            at: bool = facts["start"] == self.positions[number]
            return at and facts["origin"] == self._origin

        for state in folder.load_all(follows, damaged):
            self.positions[number] = state.facts["stop"]
            yield state.facts["total"], state.tensors
        for line in damaged:
            print(line, file=sys.stderr)
        if self.positions[number] and self._main:
            note(f"{folder.path.parent}: goes on after {self.positions[number]} batches")
        elif folder and not self.positions[number]:  # of other batches or code
            folder.clear()

    @contextmanager
    def hold_signals(self) -> Iterator[None]:
        """Let signals wait within, until `count_batch` or `close` hears them."""
        self._before = signals_wait()
        defer(True)
        try:
            yield
        finally:
            defer(self._before)

    def count_batch(self) -> int:
        """Count a batch; say whether to go on, to save or to stop, as `Poll`."""
        return self._poll.after_step()

    def save(
        self, columns: Mapping[int, dict[str, Tensor]], batches: int, total: int, word: int
    ) -> None:
        """Begin to write the answers since the last save, which nobody may change.

        Where the disk refuses, a line says so, and the pass goes on unsaved.

        Args:
            columns: of each model that answered, by its number.
            batches: of the pass until now.
            total: samples of the whole pass, over all ranks.
            word: what `count_batch` said.

        Raises:
            Stopped: a signal came, and the parts are on disk.
        """
        for number, own in columns.items():
            start, self.positions[number] = self.positions[number], batches
            facts = {"origin": self._origin, "total": total, "start": start, "stop": batches}
            state, folder = RunState(own, facts), self._folders[number]
            if self._saves:
                self._report(problem_of(partial(folder.save, state)))
        self._poll.reset()
        if word == STOP:
            self._wait()
            self._stop()

    def close(self, columns: Mapping[int, dict[str, Tensor]], batches: int, total: int) -> None:
        """Wait until all is on disk; what has come since the last save is saved where it is late.

        Signals wait no longer, unless they did before the pass. Args and errors as `save`.
        """
        defer(self._before)  # one that comes after the poll would be heard by nobody
        word = self._poll.after_epoch()
        if word != GO_ON:
            self.save(columns, batches, total, word)
        self._wait()

    def _wait(self) -> None:
        for folder in self._folders:
            self._report(problem_of(folder.wait))

    def _stop(self) -> NoReturn:
        place = self._folders[0].path.parents[1]
        words = "saved" if self._saves else "could not save"
        stop(f"{place}: {words} the answers to {max(self.positions)} batches of a pass")

    def _report(self, problem: str) -> None:
        if problem and self._saves:
            self._saves = False
            note(f"{problem}; the answers of this pass are not saved")
