"""Ranks meet afresh in a store that an earlier start has used; who is behind is named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from letheon.engine.ranks.meeting import meet
from letheon.engine.ranks.watch import name_ranks
from letheon.engine.recipe import Recipe
from letheon.errors import RunFailed


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
