"""The networks of a table: each is read when its turn comes, so that few are in memory at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.distributed import Ranks, agree, gather_rows
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.loaders.backends.memory import group_rooms

if TYPE_CHECKING:
    from letheon.eval.comparison import Entry

T = TypeVar("T")
ROOM = 2**30
"""Bytes of networks that stay on a rank's host between their turns, at most: the first of a table,
which are those that the others are compared with."""
_TOGETHER = 16  # models on the device at once


@dataclass
class Shelf:
    """Keeps the networks that were opened first, as many as fit into `room` bytes."""

    room: int = ROOM
    _networks: dict[str, Classifier] = field(default_factory=dict, repr=False)

    def open(self, name: str, read: Callable[[], Classifier]) -> Classifier:
        """Give the network of this name: the one that is kept, or read."""
        found = self._networks.get(name)
        if found is None:
            found = read()
            if count_bytes(found) <= self.room:
                self.room -= count_bytes(found)
                self._networks[name] = found
        return found


@dataclass(frozen=True)
class Source:
    """Where a network comes from when its turn comes: called, it gives the network on the host."""

    name: str
    read: Callable[[], Classifier]
    shelf: Shelf
    weights: str = ""  # digest of those that are expected; none before the first reading

    def __call__(self) -> Classifier:
        """Open the network in evaluation mode.

        Raises:
            InputError: it cannot be read, or has other weights than before.
        """
        return self.shelf.open(self.name, self._open)

    def _open(self) -> Classifier:
        model = self.read().cpu().eval()
        if self.weights and (now := weights_digest(model)) != self.weights:
            raise InputError(
                f"got {self.name} with the weights {now[:12]}, which had {self.weights[:12]} when "
                "the evaluation began; expected the same; leave its file alone, and evaluate again"
            )
        return model


def count_bytes(model: Classifier) -> int:
    """Count the bytes of a network's weights and buffers, also of one without its numbers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def group_entries(entries: Sequence[Entry], images: int, room: int) -> list[list[Entry]]:
    """Group neighbors of one preset that fit in memory: these see each image at once.

    Args:
        entries: in order, which stays.
        images: how many rows of outputs a model has in memory.
        room: bytes for a group: its outputs, its networks, and a copy of each with batch-norms
            folded; one model is a group whatever it needs.
    """
    groups: list[list[Entry]] = []
    held = 0
    for entry in entries:
        head = entry.model.head
        size = 4 * images * (head.in_features + head.out_features) + 2 * count_bytes(entry.model)
        held += size
        alike = groups and groups[-1][0].model.preset == entry.model.preset
        if not alike or held > room or len(groups[-1]) == _TOGETHER:
            groups.append([])
            held = size
        groups[-1].append(entry)
    return groups


def find_room(ranks: Ranks) -> int:
    """Bytes for a group on each rank: an eighth of the host's memory, over its ranks; all call."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min([whole, *group_rooms()])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(gather_rows(torch.tensor([memory // (8 * local)]), ranks).min())


def work_together(work: Callable[[], T], ranks: Ranks) -> T:
    """Do a rank's own work; every rank must call.

    Raises:
        InputError: that of any rank, on every rank: the others would wait in the next exchange.
    """
    found: list[T] = []
    problem = None
    try:
        found.append(work())
    except InputError as error:
        problem = str(error)
    agree(ranks, problem)
    return found[0]


def count_held(groups: Sequence[Sequence[Entry]]) -> int:
    """Count the bytes of networks that a rank holds at once while these groups see the images."""
    shelf, most = Shelf(), 0
    for group in groups:
        before = shelf.room
        for entry in group:
            shelf.open(entry.name, lambda entry=entry: entry.model)  # type: ignore[misc]
        own = sum(count_bytes(entry.model) for entry in group)
        most = max(most, 2 * own - (before - shelf.room))
    return ROOM - shelf.room + most
