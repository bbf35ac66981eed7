"""Ranks meet afresh in a store that an earlier start has used; who is behind is named."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from letheon.engine import distributed
from letheon.engine.distributed import Ranks
from letheon.engine.ranks import flight, watch
from letheon.engine.ranks.meeting import meet
from letheon.engine.ranks.store import ask, hangs
from letheon.engine.ranks.watch import name_ranks
from letheon.engine.recipe import Recipe
from letheon.errors import RunFailed
from tests.drill.processes import fork


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)


def meet_all(store: Store, world: int, late: int = 0) -> list[Store]:
    """Every rank's part of the store; ranks come in reverse order where `late` is odd."""
    order = range(world) if late % 2 == 0 else reversed(range(world))
    with ThreadPoolExecutor(world) as pool:
        coming = {r: pool.submit(meet, store.clone(), r, world, 20) for r in order}
    return [coming[rank].result() for rank in range(world)]


def test_each_start_has_a_part_of_its_own(store: TCPStore) -> None:
    """Ten starts over one store, of worlds that shrink and grow, with words of dead ranks in it."""
    for start, world in enumerate((3, 3, 2, 4, 4, 1, 3, 2, 2, 3)):
        parts = meet_all(store, world, start)
        assert not parts[0].check(["address"])  # nothing of an earlier start
        parts[-1].set("address", str(start))
        assert [part.get("address") for part in parts] == [str(start).encode()] * world


def test_a_start_whose_ranks_died_half_way_leaves_nothing(store: TCPStore) -> None:
    place = PrefixStore("letheon/meeting", store)
    with pytest.raises(RunFailed, match=r"no word of ranks \[1\] in 0\.3 s"):
        meet(store, 0, 2, 0.3)  # its rank 1 never came
    with pytest.raises(RunFailed, match="no answer of rank 0"):
        meet(store, 1, 2, 0.3)  # its rank 0 has gone, its answer has not
    assert place.check(["word/0", "word/1"])
    parts = meet_all(store, 2)
    parts[0].set("address", "new")
    assert parts[1].get("address") == b"new"


def place(host: str, steps: int, number: int) -> dict[str, Any]:
    return {"host": host, "steps": steps, "phase": "phase retain of epoch 1", "number": number}


@pytest.mark.parametrize(
    ("numbers", "steps", "words"),
    [
        ((2, 1), (5, 5), ["rank 1 on n1", "says nothing any more"]),
        ((2, 2), (5, 4), ["rank 1 on n1", "behind", "step 4", "this rank: step 5"]),
        ((2, 2), (5, 5), ["all are in phase retain of epoch 1, at step 5"]),
    ],
)
def test_those_that_are_waited_for_are_named(
    numbers: tuple[int, int], steps: tuple[int, int], words: list[str]
) -> None:
    before = {r: place(f"n{r}", steps[r], 1) for r in (0, 1)}
    after = {r: place(f"n{r}", steps[r], numbers[r]) for r in (0, 1)}
    text = name_ranks(before, after, 0)
    assert all(word in text for word in words), text


def test_the_micro_batches_follow_from_the_ranks() -> None:
    recipe = Recipe(batch_size=100, rank_batch=16)
    counts = {world: recipe.divide_batch(world).grad_accum_steps for world in (1, 2, 3, 8)}
    assert counts == {1: 7, 2: 4, 3: 3, 8: 1}  # 100, 50, 34 and 13 images a rank
    assert replace(recipe, grad_accum_steps=5).divide_batch(8).grad_accum_steps == 5
    assert Recipe(batch_size=100).divide_batch(1).grad_accum_steps == 1


@pytest.fixture
def still() -> Iterator[tuple[int, int]]:
    """The port of a store whose process stands still, and the process."""
    reading, writing = os.pipe()

    def hold() -> None:
        own = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(writing, f"{own.port}\n".encode())
        while True:
            time.sleep(60)

    process = fork(hold)
    yield int(os.read(reading, 20)), process
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(reading)
    os.close(writing)
    while hangs():  # its connection has closed, so that the threads end
        time.sleep(0.01)


def test_a_store_that_stands_still_is_named(
    still: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, process = still
    monkeypatch.setattr(watch, "PLACE", watch.Place(7, "phase retain of epoch 1", tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "n0")
    store = TCPStore("127.0.0.1", port, None, False)
    one = watch.Watch(store, 1, 3, 1000.0)
    assert one.explain_loss("mine", bool) == ""  # it answers, and knows of nobody else
    gone = {"host": "n2", "steps": 6, "phase": "phase retain of epoch 1", "number": 4}
    store.set("watch/place/2", json.dumps(gone))
    text = one.explain_loss("mine", bool)
    hurried = one.explain_loss("mine", lambda: True)
    assert hurried == "another rank has closed its connection"
    assert text.startswith("lost rank 2 on n2, which has ended, or cannot be reached (step 6, ")
    os.kill(process, signal.SIGSTOP)
    os.waitpid(process, os.WUNTRACED)  # until it stands still
    monkeypatch.setattr(watch, "_ANSWER", 0.1)
    for _ in range(2):  # the second time it is known
        text = one.explain("my stack")
        assert "waited for rank 0 on n0, which holds the ranks' store and says nothing" in text
        assert "this rank: step 7, phase retain of epoch 1" in text
    assert hangs() and "my stack" in (tmp_path / "stacks" / "rank-1.txt").read_text()
    assert "are in the run folder; mend that host" in watch.describe_silence("x")
    monkeypatch.setattr(watch.PLACE, "folder", None)  # as of a table or a mask
    assert "are on their standard error; mend that host" in watch.describe_silence("x")
    assert "lost rank 0 on n0" in one.explain_loss("other stack", bool)
    with pytest.raises(TimeoutError):
        ask(lambda: None, 5.0)  # no second thread hangs
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert "the launcher on n0" in one.explain("my stack")
    one.close()


def test_a_rank_that_hangs_in_the_store_is_ended(
    still: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, process = still
    said = tmp_path / "said"

    def work() -> None:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 2)
        sys.stderr = os.fdopen(2, "w")
        watch._LATE = 0.0
        store = TCPStore("127.0.0.1", port, None, False)
        one = watch.Watch(store, 1, 2, 0.5)
        assert one.explain_loss("", bool) == ""
        os.kill(process, signal.SIGSTOP)
        while True:  # as one that waits for others does
            store.add("place", 0)

    _, status = os.waitpid(fork(work), 0)
    assert os.waitstatus_to_exitcode(status) == 3
    text = said.read_text()
    assert text.count("error: ") == 1 and "waited for rank 0 on" in text


def test_the_flight_recorder_is_on_before_the_group_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The variables alone: no NCCL here."""
    names = (*flight.RECORDER, flight.PATH, *flight._OLDER.values())
    environment = {k: v for k, v in os.environ.items() if k not in names}
    monkeypatch.setattr(os, "environ", environment)
    seen: dict[str, str] = {}
    monkeypatch.setattr(distributed, "rendezvous", lambda *args, **more: iter([(Store(), 1, 2)]))
    monkeypatch.setattr(distributed, "_meet", lambda *args: Store())
    monkeypatch.setattr(distributed, "Watch", lambda *args: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda *args, **more: seen.update(environment)
    )
    for kind, values in (("cpu", {}), ("cuda", flight.RECORDER)):
        ranks = Ranks(1, 2, 1, torch.device(kind))
        with distributed._join_group(ranks, 5.0):
            assert {k: v for k, v in seen.items() if k in names} == values
    cuda = torch.device("cuda")
    flight.write_flights_to(tmp_path / "gone" / "stacks", cuda)
    assert flight.PATH not in environment and not (tmp_path / "gone").exists()
    for name in ("one", "two"):  # runs of one process
        (tmp_path / name).mkdir()
        flight.write_flights_to(tmp_path / name / "stacks", cuda)
        assert environment[flight.PATH] == f"{tmp_path}/{name}/stacks/nccl-rank-"
    environment |= {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "mine", "TORCH_FR_BUFFER_SIZE": "7"}
    del environment[flight.PATH]
    flight.write_flights_to(tmp_path / "one" / "stacks", cuda)
    flight.record_collectives(cuda)
    assert flight.PATH not in environment and environment["TORCH_FR_BUFFER_SIZE"] == "7"
