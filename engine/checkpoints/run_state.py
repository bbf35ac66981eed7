"""The state of a stopped run on disk: safetensors and JSON, digested, two kept, nothing pickled.

A state is two files of one number in a folder: the tensors, and a JSON file that is written last
and holds everything else with the SHA-256 of both. A state without the second file is no state; one
whose digests do not agree is named and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from letheon import durable
from letheon.engine.distributed import Ranks, gather_objects, wait_for_ranks
from letheon.errors import RunFailed
from letheon.regular import open_regular
from letheon.sealed import read_json
from letheon.spans import span

STATES = 2
"""States that stay on disk: the newest, and one should that be damaged."""


@dataclass(frozen=True)
class RunState:
    """Tensors by name, on the host, and what else there is to know, ready for JSON."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def position(self) -> int:
        """Steps of the run before this state, those of a pass under way among them."""
        within = 0 if self.facts["between"] else self.facts["pass"]["tallies"][0]["position"]
        return int(self.facts["steps"] + within)

    def below(self, place: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `place` and a dot, without these."""
        return {
            name.removeprefix(f"{place}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{place}.")
        }


@dataclass
class _StateFiles:
    """The files of a run's states: tensors, and facts that name their digest and have one."""

    path: Path

    def __bool__(self) -> bool:
        """True where some state has been saved, whole or not."""
        return bool(self._numbers())

    def _numbers(self) -> list[int]:
        return [int(file.stem) for file in self.path.glob("*.json") if file.stem.isdecimal()]

    def _file(self, number: int, kind: str) -> Path:
        return self.path / f"{number:06d}.{kind}"

    def _remove_rest(self) -> None:
        """Remove tensors without their second file, which a process that died has left."""
        numbers = self._numbers()
        for file in self.path.glob("*.safetensors"):
            if file.stem.isdecimal() and int(file.stem) not in numbers:
                file.unlink(missing_ok=True)

    def _remove(self, number: int) -> None:
        for kind in ("json", "safetensors"):
            self._file(number, kind).unlink(missing_ok=True)

    def _facts(self, number: int) -> dict[str, Any]:
        facts = read_json(self._file(number, "json"))
        if not isinstance(facts, dict) or facts.pop("digest", None) != _seal(facts):
            raise ValueError("its digest is another")
        return facts

    def _tensors(self, number: int, facts: Mapping[str, Any]) -> dict[str, Tensor]:
        file = self._file(number, "safetensors")
        if _sha256(file) != facts["tensors"]:
            raise ValueError(f"{file.name} has another digest")
        return load_file(file)


@dataclass
class StateFolder(_StateFiles):
    """The states of one run, by number; the newest whole one counts. For one rank."""

    log: Path | None = None
    """A file whose lines up to now must be on disk before a state that knows its length is."""
    limit: int | None = STATES
    """States that stay on disk, the newest; None: all."""
    _writer: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "state-writer")
    )
    _write: Future[None] | None = None
    _damaged: set[int] = field(default_factory=set)  # that were met; the next state replaces them

    def save(self, state: RunState) -> None:
        """Write a state in a thread, after the last one is on disk; nobody may change its tensors.

        Raises:
            RunFailed: the last write failed, by a full disk perhaps; it names the file.
        """
        self.wait()
        self._write = self._writer.submit(self._save, state)

    def write(self, state: RunState) -> None:
        """Write a state now; raises as `save`."""
        self.wait()
        self._save(state)

    def wait(self) -> None:
        """Wait until the last state is on disk; raises as `save`."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def load(
        self, accept: Callable[[Mapping[str, Any]], bool]
    ) -> tuple[RunState | None, list[str]]:
        """Read the newest state that is whole and whose facts are accepted.

        Returns:
            The state, None where there is none; and a line about each that is damaged.
        """
        damaged: list[str] = []
        return next(
            self._read(sorted(self._numbers(), reverse=True), accept, damaged), None
        ), damaged

    def load_all(
        self, accept: Callable[[Mapping[str, Any]], bool], damaged: list[str]
    ) -> Iterator[RunState]:
        """Yield the states that are whole and accepted, from the oldest; name damaged ones.

        `accept` is asked about one once those before it have been yielded.
        """
        yield from self._read(sorted(self._numbers()), accept, damaged)

    def _read(
        self,
        numbers: Sequence[int],
        accept: Callable[[Mapping[str, Any]], bool],
        damaged: list[str],
    ) -> Iterator[RunState]:
        for number in numbers:
            try:
                facts = self._facts(number)
                state = RunState(self._tensors(number, facts), facts) if accept(facts) else None
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                reason = str(error).partition("\n")[0]
                damaged.append(f"{self._file(number, 'json')} is damaged ({reason}); left out")
                self._damaged.add(number)
            else:
                if state is not None:
                    yield state

    def find(
        self, accept: Callable[[Mapping[str, Any]], bool], verify: bool = False
    ) -> Path | None:
        """Find the tensors of the newest state whose facts are accepted; None where none is.

        Args:
            accept: as in `load`; a state at which it raises ValueError is replaced by the next.
            verify: compare the digest of the tensors, too.
        """
        for number in sorted(self._numbers(), reverse=True):
            file = self._file(number, "safetensors")
            try:
                facts = self._facts(number)
                if not accept(facts):
                    continue
                if verify and _sha256(file) != facts["tensors"]:
                    raise ValueError(f"{file.name} has another digest")
            except (OSError, ValueError, KeyError):
                self._damaged.add(number)
                continue
            self._damaged.discard(number)  # of another state, when it was last looked for
            return file
        return None

    def clear(self) -> None:
        """Remove every state, once the run is finished or begins anew."""
        self.wait()
        for number in self._numbers():
            self._remove(number)
        self._remove_rest()
        if self.path.is_dir():
            for left in self.path.glob(f"*{durable.PARTIAL}"):
                left.unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    @span("saving")
    def _save(self, state: RunState) -> None:
        number = max(self._numbers(), default=0) + 1
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFailed(
                f"got {error.strerror or error} while making {self.path}; expected a disk that can "
                "be written; mend it, and run again"
            ) from error
        file = self._file(number, "safetensors")
        with durable.replacing(file) as temporary:
            try:
                save_file({k: v.contiguous() for k, v in state.tensors.items()}, temporary)
            except SafetensorError as error:
                raise OSError(None, str(error)) from error
            digest = _sha256(temporary)
        if self.log is not None and self.log.exists():
            with durable.disk_errors(self.log):
                durable.flush(self.log)
        facts = {**state.facts, "tensors": digest}
        text = json.dumps({**facts, "digest": _seal(facts)}, sort_keys=True)
        durable.write(self._file(number, "json"), text + "\n")
        for old in self._damaged:  # or one of them would be kept in the place of a whole one
            self._remove(old)
        self._damaged.clear()
        self._remove_rest()
        for old in sorted(self._numbers())[: -self.limit] if self.limit else ():
            self._remove(old)


def problem_of(work: Callable[[], None]) -> str:
    """Do work that may fail on one rank alone, and say how it failed; empty where it did not."""
    try:
        work()
    except RunFailed as error:
        return str(error)
    return ""


def save_on_first(folder: StateFolder, state: RunState | None, ranks: Ranks) -> None:
    """Begin to write a state that the first rank has; None writes nothing. Every rank must call.

    Raises:
        RunFailed: on every rank: the last write failed.
    """
    own = state
    fail_together("" if own is None else problem_of(lambda: folder.save(own)), ranks)


def wait_on_first(folder: StateFolder, ranks: Ranks) -> None:
    """Wait until each rank's last state is on disk, mostly the first rank's alone; every rank must
    call, raises as before."""  # noqa: D205, D209
    problem = problem_of(folder.wait)
    wait_for_ranks(ranks)  # a slow disk is no timeout
    fail_together(problem, ranks)


def fail_together(problem: str, ranks: Ranks) -> None:
    """Raise `RunFailed` on every rank where any has a problem (`problem_of`)."""
    if first := next(filter(None, gather_objects(problem, ranks)), ""):
        raise RunFailed(first) from OSError(first)


def copy_to_host(tensor: Tensor) -> tuple[Tensor, list[int] | None]:
    """Copy a tensor to the host, and name its strides where it is stored in another order."""
    strides = None if tensor.is_contiguous() else list(tensor.stride())
    return tensor.detach().to("cpu", copy=True), strides


def copy_from_host(host: Tensor, strides: list[int] | None, device: torch.device | str) -> Tensor:
    """Undo `copy_to_host`: the same numbers in the same memory order, on `device`."""
    if strides is None:
        return host.to(device, copy=True)
    return torch.empty_strided(host.shape, strides, dtype=host.dtype, device=device).copy_(host)


def read_random(ranks: Ranks) -> list[Tensor]:
    """The state of torch's generators that a step may draw from."""
    states = [torch.get_rng_state()]
    if ranks.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(ranks.device))
    return states


def set_random(states: Sequence[Tensor], ranks: Ranks) -> None:
    """Put back what `read_random` gave."""
    torch.set_rng_state(states[0])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(states[1], ranks.device)


def _sha256(file: Path) -> str:
    with open_regular(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _seal(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8")).hexdigest()
