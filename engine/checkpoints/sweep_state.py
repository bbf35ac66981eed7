"""What the passes over image sets before training have added up to, saved while they run.

    a = torch.zeros(...)
    for batch in sweeps.watch("name", Sums(a), lambda skip: loader.sweep(rows, skip), rounds):
        a += ...

A preparation that was stopped is done again from the same weights; a pass of it that had been saved
gets back the sums and the random state of each rank, and skips the batches that are in them. So it
ends bitwise as if it had not been stopped, on as many ranks.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.run_state import (
    RunState,
    StateFolder,
    copy_to_host,
    read_random,
    save_on_first,
    set_random,
    wait_on_first,
)
from letheon.engine.distributed import gather_tensors, scatter_objects
from letheon.engine.memory.shards import Shards
from letheon.engine.runs.stop import GO_ON, STOP, Poll, defer, signals_wait, stop

T = TypeVar("T")


class Sums:
    """Tensors of this rank that a pass adds to in place."""

    def __init__(self, *tensors: Tensor) -> None:
        self._own = tensors

    def tensors(self) -> Sequence[Tensor]:
        """What has been added up so far, not copied."""
        return self._own

    def load(self, saved: Sequence[Tensor]) -> None:
        """Put back what `tensors` gave, from the host."""
        for own, other in zip(self._own, saved, strict=True):
            own.copy_(other)


class Gradients(Sums):
    """The gradients that backward passes add up in parameters; none before the first of them."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters

    def tensors(self) -> Sequence[Tensor]:
        """As `Sums`; zeros for a parameter without a gradient."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]

    def load(self, saved: Sequence[Tensor]) -> None:
        """As `Sums`."""
        for parameter, other in zip(self._parameters, saved, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(other)


class SplitGradients(Gradients):
    """The same of a network that is split over the ranks: this rank's parts."""

    def __init__(self, shards: Shards) -> None:
        super().__init__([*shards.weights.values()])
        self._shards = shards

    def tensors(self) -> Sequence[Tensor]:
        """As `Gradients`."""
        self._shards.average()
        return super().tensors()

    def load(self, saved: Sequence[Tensor]) -> None:
        """As `Sums`."""
        self._shards.load_gradients(saved)


class Rows(Sums):
    """Columns of rows, each a list of tensors that begins with an empty one and is appended to."""

    def __init__(self, columns: Sequence[list[Tensor]]) -> None:
        self._columns = columns

    def tensors(self) -> Sequence[Tensor]:
        """As `Sums`, each column in one piece."""
        return [torch.cat(column) for column in self._columns]

    def load(self, saved: Sequence[Tensor]) -> None:
        """As `Sums`."""
        for column, other in zip(self._columns, saved, strict=True):
            column[:] = [other.to(column[0].device)]


@dataclass
class _Sweep:
    """A pass under way."""

    key: str
    sums: Sums
    rounds: int
    position: int = 0  # rounds that are over


class Sweeps:
    """The passes of one preparation, one after another or one within another; on every rank.

    Attributes:
        out: what is prepared, as it is named to people.
        seconds: that were spent on what this process has not done again.
        history: for the record, as `Saver.history`; saved along.
    """

    def __init__(self, folder: Path | None, poll: Poll, out: Path) -> None:
        """Save in `folder` when `poll` says so; None only stops. `out` is named to people."""
        self._folder, self.out = None if folder is None else StateFolder(folder), out
        self._poll, self._ranks = poll, poll.ranks
        self._records: dict[str, tuple[int, list[Tensor]]] = {}  # key -> position, on the host
        self._open: list[_Sweep] = []
        self._deferred = False
        self._counts: Counter[str] = Counter()
        self._origin: Mapping[str, Any] = {}
        self._before, self.seconds = 0.0, 0.0
        self._started = time.perf_counter()
        self.history: list[dict[str, Any]] = []

    def load(self, origin: Mapping[str, Any]) -> bool:
        """Find what was saved on as many ranks; whether there is any. Every rank must call.

        Args:
            origin: what the sums depend on besides weights, samples and batches, ready for JSON;
                read on the first rank.
        """
        self._origin, ranks = origin, self._ranks
        parts: list[tuple[dict[str, Any], dict[str, Tensor]]] = [({}, {})] * ranks.world
        if ranks.main and self._folder is not None:
            known = {"world": ranks.world, "origin": origin}
            found, damaged = self._folder.load(
                lambda facts: all(facts.get(name) == value for name, value in known.items())
            )
            for line in damaged:
                print(line, file=sys.stderr)
            if found is not None:
                parts = [(found.facts, found.below(str(rank))) for rank in range(ranks.world)]
        facts, tensors = scatter_objects(parts, ranks)
        for number, (key, position, count) in enumerate(facts.get("passes", ())):
            self._records[key] = position, [tensors[f"{number}.{k}"] for k in range(count)]
        self._before, self.history = facts.get("seconds", 0.0), facts.get("history", [])
        self._started = time.perf_counter()
        return bool(facts)

    def watch(
        self, name: str, sums: Sums, items: Callable[[int], Iterator[T]], rounds: int
    ) -> Iterator[T]:
        """Yield the items of a pass; after each, what `sums` holds is saved where it is time to.

        Args:
            name: says all that the sums depend on, but for the `origin` of `load`.
            sums: this rank's.
            items: items(skip), this rank's without the first ones; within each may lie a pass.
            rounds: items of the rank that has the most of them, equal on every rank.

        Raises:
            Stopped: a signal came; the sums are on disk.
            RunFailed: on every rank: the last sums could not be written.
        """
        one = self._start(name, sums, rounds)
        if len(self._open) == 1:
            self._deferred = signals_wait()  # by another run of this process
        defer(True)
        try:
            for item in items(one.position):
                yield item
                self._advance(one)
            while one.position < rounds:  # other ranks have an item more
                self._advance(one)
            defer(self._deferred or len(self._open) > 1)
            self._save(self._poll.after_epoch())
            if one.key in self._records:
                self._keep(one)
        finally:
            self._open.remove(one)
            defer(self._deferred or bool(self._open))

    def close(self) -> None:
        """Wait until all is on disk, and let the sums go. Every rank must call."""
        self._records.clear()
        if self._folder is not None:
            wait_on_first(self._folder, self._ranks)

    def clear(self) -> None:
        """Remove what was saved, on the first rank."""
        if self._ranks.main and self._folder is not None:
            self._folder.clear()

    def _start(self, name: str, sums: Sums, rounds: int) -> _Sweep:
        outer = self._open[-1] if self._open else None
        path = f"{outer.key}/{outer.position}/{name}" if outer is not None else name
        self._counts[path] += 1
        one = _Sweep(f"{path}#{self._counts[path]}", sums, rounds)
        if one.key in self._records:
            one.position, tensors = self._records[one.key]
            states = len(read_random(self._ranks))
            sums.load(tensors[states:])
            set_random(tensors[:states], self._ranks)
            self.seconds = self._before
        self._open.append(one)
        return one

    def _advance(self, one: _Sweep) -> None:
        """An item is over; what passes within it have left is in this one's sums."""
        one.position += 1
        for key in [key for key in self._records if key.startswith(f"{one.key}/")]:
            del self._records[key]
        self._save(self._poll.after_step())

    def _keep(self, one: _Sweep) -> None:
        tensors = [*read_random(self._ranks), *one.sums.tensors()]
        self._records[one.key] = one.position, [copy_to_host(tensor)[0] for tensor in tensors]

    def _save(self, word: int) -> None:
        """Save all passes under way and before, where `word` says so; stop where it says that."""
        if self._folder is None and word == STOP:
            stop(f"{self.out}: in its preparation, which is made again")
        if self._folder is None or word == GO_ON:
            return
        for one in self._open:
            self._keep(one)
        own = {
            f"{number}.{k}": tensor
            for number, (_, tensors) in enumerate(self._records.values())
            for k, tensor in enumerate(tensors)
        }
        everyone = gather_tensors(own, self._ranks)
        passes = [[key, position, len(ts)] for key, (position, ts) in self._records.items()]
        facts = {
            "world": self._ranks.world, "origin": self._origin, "passes": passes,
            "seconds": self.seconds + time.perf_counter() - self._started,
            "history": self.history,
        }  # fmt: skip
        tensors = {f"{r}.{name}": t for r, mine in enumerate(everyone) for name, t in mine.items()}
        state = RunState(tensors, facts) if self._ranks.main else None
        save_on_first(self._folder, state, self._ranks)
        self._poll.reset()
        if word == STOP:
            wait_on_first(self._folder, self._ranks)
            one = self._open[-1]
            stop(
                f"{self.out}: saved in its preparation, after {one.position} of {one.rounds} "
                "batches of a pass"
            )
