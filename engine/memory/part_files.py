"""State of a network split over the ranks on disk: each rank's part in files of its own.

    state/             what is small or whole on every rank, by the first rank
    state/part-0003/   weights, slots, averages and masks of rank 3, by that rank

The files are those of any state: safetensors, and JSON with their digest. A state of the first rank
names its parts by a token; without one of them it is no state. Any number of ranks reads them, each
the rows that it needs.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from letheon.engine.checkpoints.run_state import (
    RunState,
    StateFolder,
    save_on_first,
    wait_on_first,
)
from letheon.engine.distributed import Ranks, gather_objects
from letheon.engine.memory.shards import from_first, own_part, part_rows
from letheon.engine.method import Run
from letheon.engine.step import Step
from letheon.errors import RunFailed

PART = "part"
"""First word of the names of what a rank has its part of, in a state of a network that is split."""
TOKEN = "token"
"""Fact that a state of the first rank and those of its parts have in common."""
_PLACE = "part-{:04d}"


class PartFiles:
    """The parts of one run's states; every rank must call each function."""

    def __init__(self, root: Path, ranks: Ranks) -> None:
        """`root` is the folder of the run's states, on a file system that all ranks share."""
        self._root, self._ranks = root, ranks
        self._folder = self._of(ranks.rank)
        self._facts: dict[str, Any] = {}  # of the first rank's state that was checked last
        self._saves = False

    def save(self, state: RunState) -> RunState:
        """Begin to write this rank's part of a state; returns the rest, which names the parts.

        Raises:
            RunFailed: on every rank: the last write failed.
        """
        self._saves = True
        token = from_first(secrets.token_hex(8))
        save_on_first(self._folder, RunState(state.below(PART), {TOKEN: token}), self._ranks)
        rest = {k: v for k, v in state.tensors.items() if not k.startswith(f"{PART}.")}
        return RunState(rest, {**state.facts, TOKEN: token})

    def wait(self) -> None:
        """Wait until all parts are on disk; raises as `save`."""
        if self._saves:
            wait_on_first(self._folder, self._ranks)

    def check(self, facts: Mapping[str, Any]) -> str:
        """Verify the digests of a state's parts, shared out over the ranks.

        This rank's later states are then no longer counted: their first rank's is not whole.

        Returns:
            What is amiss on any rank, the same on all; empty where nothing is.
        """
        self._facts = dict(facts)
        rank, world = self._ranks.rank, facts["world"]
        goal = _accept(str(facts.get(TOKEN)))
        problem = ""
        if self._folder.find(goal, verify=True) is None and rank < world:
            problem = self._missing(rank)
        for number in range(rank + self._ranks.world, world, self._ranks.world):
            if self._of(number).find(goal, verify=True) is None:
                problem = self._missing(number)
        return next(filter(None, gather_objects(problem, self._ranks)), "")

    def join(self, state: RunState, splits: bool) -> RunState:
        """Add to the first rank's state that was checked what this rank now needs of its parts.

        Args:
            state: the first rank's; as it is where the network was whole.
            splits: whether the network is split now, over any number of ranks; else all is read.

        Raises:
            RunFailed: a part that is needed is not there.
        """
        facts, own = state.facts, state.tensors
        if not facts.get("split"):
            return state
        part = self._load(splits)
        if splits:
            return RunState({**own, **{f"{PART}.{k}": v for k, v in part.items()}}, facts)
        return RunState({**own, **part}, {**facts, "split": False})

    def _load(self, splits: bool) -> dict[str, Tensor]:
        facts = self._facts
        world, rows, goal = facts["world"], facts["rows"], _accept(facts[TOKEN])
        place, places = (self._ranks.rank, self._ranks.world) if splits else (0, 1)
        tensors: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files: dict[int, Any] = {}

            def open_part(number: int) -> Any:
                if number not in files:
                    path = self._of(number).find(goal)
                    if path is None:
                        raise RunFailed(self._missing(number))
                    files[number] = stack.enter_context(safe_open(path, framework="pt"))
                return files[number]

            near = open_part(min(self._ranks.rank, world - 1))
            for name in near.keys():  # noqa: SIM118
                if name not in rows:
                    tensors[name] = near.get_tensor(name)
                    continue
                start, stop = _span(rows[name], place, places)
                pieces = []
                for number in range(world):
                    first, last = _span(rows[name], number, world)
                    low, high = max(start, first), min(stop, last)
                    if low < high:
                        part = open_part(number).get_slice(name)
                        pieces.append(part[low - first : high - first])
                tensors[name] = torch.cat(pieces) if pieces else near.get_tensor(name)[:0].clone()
        return tensors

    def clear(self) -> None:
        """Remove the parts of all ranks."""
        for place in self._root.glob(_PLACE.format(0)[:-4] + "*"):
            StateFolder(place).clear()

    def _of(self, number: int) -> StateFolder:
        return StateFolder(self._root / _PLACE.format(number))

    def _missing(self, number: int) -> str:
        return (
            f"got no whole {self._root / _PLACE.format(number)}, a rank's part of the state of a "
            "network that was split over the ranks; expected one; put the run folder on a file "
            "system that all ranks share"
        )


def _accept(token: str) -> Callable[[Mapping[str, Any]], bool]:
    def accept(facts: Mapping[str, Any]) -> bool:
        if facts.get(TOKEN) != token:
            raise ValueError("part of another state")
        return True

    return accept


def _span(total: int, rank: int, world: int) -> tuple[int, int]:
    rows = part_rows(total, world)
    start = sum(rows[:rank])
    return start, start + rows[rank]


def whole_rows(run: Run, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name the tensors of a state that are split as weights are -> rows of the whole.

    Args:
        run: of a network that is split.
        step: its step.
        tensors: by their names in the state, as this rank has them.
    """
    likes = _name_weights(run, step, tensors)
    found = {}
    for name, tensor in tensors.items():
        own, whole = likes(name) or (None, None)
        if own is not None and whole is not None and tensor.shape == own.shape:
            found[name] = whole[0]
    return found


def cut_whole(run: Run, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut this rank's part out of the state of a whole network."""
    likes, ranks = _name_weights(run, step, tensors), run.ranks
    found = {}
    for name, tensor in tensors.items():
        _, whole = likes(name) or (None, None)
        if whole is not None and tensor.shape == whole:
            start, stop = _span(whole[0], ranks.rank, ranks.world)
            tensor = tensor[start:stop].clone()
        found[name] = tensor
    return found


def _name_weights(
    run: Run, step: Step, names: Iterable[str]
) -> Callable[[str], tuple[Tensor, torch.Size] | None]:
    """Return a function: name of a state's tensor -> the weight that it is made like.

    That is this rank's part, and the shape of the whole. What a method keeps of weights lies under
    a weight's name, or in a list with one for each parameter.
    """
    shards = run.shards
    assert shards is not None
    weights = {name: (own_part(w), w.shape) for name, w in run.model.named_parameters()}
    short = {name.removeprefix("net."): value for name, value in weights.items()}
    trained = [(part, shards.whole_shape(part)) for part in run.parameters]
    slots: dict[str, list[tuple[Tensor, torch.Size]]] = {}

    def slot(name: str) -> list[tuple[Tensor, torch.Size]]:
        if name not in slots:
            groups = step.slot_optimizer(name).param_groups
            parts = [part for group in groups for part in group["params"]]
            slots[name] = [(part, shards.whole_shape(part)) for part in parts]
        return slots[name]

    lists = Counter(name.rpartition(".")[0] for name in names if name.startswith("method."))
    numbered = {
        name
        for name in names
        if (parts := name.rpartition("."))[2].isdecimal() and lists[parts[0]] == len(trained)
    }

    def like(name: str) -> tuple[Tensor, torch.Size] | None:
        kind, _, rest = name.partition(".")
        first, _, last = rest.partition(".")
        if kind == "model":
            return weights.get(rest)
        if kind == "snapshot":
            return short.get(last)
        if kind == "average":
            return trained[int(rest)]
        if kind == "optimizer":
            return slot(first)[int(last.partition(".")[0])]
        if kind == "method":
            if name in numbered:
                return trained[int(name.rpartition(".")[2])]
            ends = [key for key in short if f".{rest}".endswith(f".{key}")]
            return short[max(ends, key=len)] if ends else None
        return None

    return like
