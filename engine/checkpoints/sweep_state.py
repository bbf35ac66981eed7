"""What the passes over image sets before training have added up to, saved while they run.

    a = torch.zeros(...)
    for batch in sweeps.watch("name", Sums(a), lambda skip: loader.sweep(rows, skip), rounds):
        a += ...

A preparation that was stopped is done again from the same weights; a pass of it that had been saved
gets back the sums and the random state of each rank, and skips the batches that are in them. So it
ends bitwise as if it had not been stopped, on as many ranks.

The first rank writes all files, and holds one other rank's share at a time:

    000001.*              what the passes are, and the first rank's share
    part-0003/000001.*    the share of rank 3; a state without one of its parts is none
"""

from __future__ import annotations

import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from letheon.engine.checkpoints.run_state import (
    RunState,
    StateFolder,
    copy_to_host,
    fail_together,
    problem_of,
    read_random,
    save_on_first,
    set_random,
    wait_on_first,
)
from letheon.engine.distributed import (
    Ranks,
    gather_in_turn,
    scatter_in_turn,
    scatter_objects,
    wait_for_ranks,
)
from letheon.engine.memory.shards import Shards
from letheon.engine.runs.stop import GO_ON, STOP, Poll, defer, signals_wait, stop
from letheon.errors import RunFailed

T = TypeVar("T")
_TOKEN = "token"  # of a state and its parts


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


class _Shares:
    """What each rank has of a preparation, in files that the first rank writes and reads."""

    def __init__(self, place: Path, ranks: Ranks) -> None:
        self._place, self._ranks = place, ranks
        self.own = StateFolder(place)
        self._parts = [StateFolder(place / f"part-{rank:04d}") for rank in range(ranks.world)]

    def save(self, own: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Save every rank's tensors, on the host, which nobody changes; raises `RunFailed`."""
        if self._ranks.world > 1:
            token = secrets.token_hex(8)  # the first rank's counts
            problem = problem_of(self.own.wait)  # or the last state would lose its parts
            wait_for_ranks(self._ranks)
            with closing(gather_in_turn(own, self._ranks)) as others:
                for rank, tensors in enumerate(others, 1):
                    write = partial(self._parts[rank].write, RunState(tensors, {_TOKEN: token}))
                    problem = problem or problem_of(write)
                    tensors.clear()  # before there is room for the next rank's
            fail_together(problem, self._ranks)
            facts = {**facts, _TOKEN: token}
        save_on_first(self.own, RunState(own, facts) if self._ranks.main else None, self._ranks)

    def load(self, known: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Find the newest whole state whose facts are `known`; its facts and this rank's tensors.

        Without one both are empty. Parts of states that never became whole are replaced first.
        """
        ranks, found = self._ranks, None
        if ranks.main:
            found, damaged = self.own.load(lambda facts: self._is_whole(facts, known))
            for line in damaged:
                print(line, file=sys.stderr)
        wait_for_ranks(ranks)
        facts: dict[str, Any] = scatter_objects([found.facts if found else {}] * ranks.world, ranks)
        if not facts or ranks.world == 1:
            return facts, found.tensors if found else {}
        parts = (self._read(rank, facts[_TOKEN]) for rank in range(1, ranks.world))
        others = scatter_in_turn(parts, ranks)
        return facts, found.tensors if found else others

    def _is_whole(self, facts: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
        if any(facts.get(name) != value for name, value in known.items()):
            return False
        for part in self._parts[1:]:
            if part.find(_has(facts[_TOKEN]), verify=True) is None:
                raise ValueError(f"it lacks {part.path.name}")
        return True

    def _read(self, rank: int, token: str) -> dict[str, Tensor]:
        path = self._parts[rank].find(_has(token))
        if path is None:
            raise RunFailed(f"got no {self._parts[rank].path} any more; run again")
        return load_file(path)

    def clear(self) -> None:
        """Remove all files, those of other numbers of ranks, too."""
        self.own.wait()
        clear_preparation(self._place)


def clear_preparation(place: Path) -> None:
    """Remove what was saved of a preparation, every rank's share."""
    for folder in (*place.glob("part-*"), place):
        StateFolder(folder).clear()


def _has(token: str) -> Callable[[Mapping[str, Any]], bool]:
    def accept(facts: Mapping[str, Any]) -> bool:
        if facts.get(_TOKEN) != token:
            raise ValueError("part of another state")
        return True

    return accept


class Sweeps:
    """The passes of one preparation, one after another or one within another; on every rank.

    Attributes:
        out: what is prepared, as it is named to people.
        seconds: that were spent on what this process has not done again.
        history: for the record, as `Saver.history`; saved along.
    """

    def __init__(self, folder: Path | None, poll: Poll, out: Path) -> None:
        """Save in `folder` when `poll` says so; None only stops. `out` is named to people."""
        self._poll, self._ranks = poll, poll.ranks
        self._shares = None if folder is None else _Shares(folder, poll.ranks)
        self.out = out
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
        self._origin = origin
        facts: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        if self._shares is not None:
            facts, tensors = self._shares.load(
                {"world": self._ranks.world, "origin": origin, "shares": True}
            )
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
        if self._shares is not None:
            wait_on_first(self._shares.own, self._ranks)

    def clear(self) -> None:
        """Remove what was saved, on the first rank."""
        if self._ranks.main and self._shares is not None:
            self._shares.clear()

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
        if self._shares is None and word == STOP:
            stop(f"{self.out}: in its preparation, which is made again")
        if self._shares is None or word == GO_ON:
            return
        for one in self._open:
            self._keep(one)
        own = {
            f"{number}.{k}": tensor
            for number, (_, tensors) in enumerate(self._records.values())
            for k, tensor in enumerate(tensors)
        }
        passes = [[key, position, len(ts)] for key, (position, ts) in self._records.items()]
        facts = {
            "world": self._ranks.world, "origin": self._origin, "shares": True, "passes": passes,
            "seconds": self.seconds + time.perf_counter() - self._started,
            "history": self.history,
        }  # fmt: skip
        self._shares.save(own, facts)
        self._poll.reset()
        if word == STOP:
            wait_on_first(self._shares.own, self._ranks)
            one = self._open[-1]
            stop(
                f"{self.out}: saved in its preparation, after {one.position} of {one.rounds} "
                "batches of a pass"
            )
