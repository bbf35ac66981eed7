"""Stopping a run at a step and going on with it, in one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from letheon.engine.checkpoints.saver import open_saver
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.runs.run_folder import Record
from letheon.engine.runs.stop import Poll
from tests.world import weights

Lines = list[dict[str, Any]]
TIMES = ("at", "seconds", "compile_seconds", "images_per_second", "previous")


class Break(Exception):
    """The run is stopped, as by a kill."""


class BreakAt(Poll):
    """Saves every so many steps, and stops the run after step `last` without another word."""

    def __init__(self, ranks: Ranks, every: int, last: int):
        super().__init__(ranks, steps=every)
        self.taken, self.last = 0, last

    def after_step(self, *broken: Callable[[], bool]) -> int:
        """Count, too."""
        self.taken += 1
        if self.taken > self.last:
            raise Break
        return super().after_step(*broken)


def attempt(
    method: Method, make: Callable[[], Run], folder: Path, poll: Poll, resume: bool
) -> tuple[dict[str, Tensor], Lines] | None:
    """A run from its state, if any, to its end or to where the poll breaks it."""
    run = make()
    record = Record(folder, run.ranks, {}, resume)
    saver = open_saver(record, poll, resume)
    torch.manual_seed(11 + run.ranks.rank)
    try:
        run_method(method, run, record.log, saver)
    except Break:
        saver.wait()
        return None
    saver.finish()
    record.finish()
    return weights(run), lines(folder)


def lines(folder: Path) -> Lines:
    """The lines of metrics.jsonl without its times; nothing on a rank that writes none."""
    file = folder / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def differing(
    method: Method, make: Callable[[], Run], folder: Path, stops: list[int], every: int = 1
) -> list[str]:
    """Name what differs between a run and the same one that is stopped after each of `stops`."""
    ranks = make().ranks
    count = BreakAt(ranks, 0, sys.maxsize)
    whole = attempt(method, make, folder / "whole", count, False)
    assert whole is not None
    left = count.taken
    for turn, stop in enumerate(stops):
        poll = BreakAt(ranks, every, min(stop, left - 1))
        if poll.last < 1:
            break  # the method takes fewer steps, or none
        assert attempt(method, make, folder / "parts", poll, turn > 0) is None
        left -= poll.last // every * every
    ended = attempt(method, make, folder / "parts", Poll(ranks), True)
    assert ended is not None
    odd = [key for key, value in whole[0].items() if not torch.equal(value, ended[0][key])]
    if ranks.main and whole[1] != ended[1]:
        odd.append("metrics.jsonl")
    assert not (folder / "parts" / "state").exists() or not ranks.main
    return odd
