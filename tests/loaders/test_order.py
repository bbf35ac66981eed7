"""The composition of global batches, against the contract's definition by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest

from letheon.errors import InputError
from letheon.loaders import order
from letheon.loaders.batch import Reads, Stream

FORGET = np.arange(101) % 5 == 2  # 20 of 101


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (32, [8, 8, 8, 8]),
        (36, [8, 8, 8, 8, 4]),
        (35, [8, 8, 8, 6, 5]),
        (33, [8, 8, 8, 5, 4]),
        (39, [8, 8, 8, 8, 7]),
        (3, [3]),
        (9, [5, 4]),
        (0, []),
    ],
)
def test_sizes(n: int, expected: list[int]) -> None:
    assert order.sizes(n, 8) == expected


@pytest.mark.parametrize("reads", get_args(Reads))
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("block", [0, 4])
def test_ranks_together_make_the_one_rank_batches(
    reads: Reads, world: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "MIXED", 3)
    alone = order.epoch_parts(reads, FORGET, 16, 7, 3, block=block)
    shares = [
        order.epoch_parts(reads, FORGET, 16, 7, 3, rank, world, block) for rank in range(world)
    ]
    for step, whole in enumerate(alone):
        parts = [mine[step] for mine in shares]
        together = np.concatenate([part.samples for part in parts])
        assert sorted(together) == sorted(whole.samples)
        assert {part.total for part in parts} == {whole.total} == {len(whole.samples)}
        if reads == "paired":  # every rank has as many forget as retain samples, retain first
            for part in parts:
                half = len(part.samples) // 2
                assert FORGET[part.samples].tolist() == [False] * half + [True] * half
        else:
            assert together.tolist() == whole.samples.tolist()


@pytest.mark.parametrize(("reads", "n"), [("forget", 20), ("retain", 81), ("mixed", 101)])
def test_each_sample_once_an_epoch(reads: Reads, n: int) -> None:
    for epoch in range(3):
        seen = np.concatenate([p.samples for p in order.epoch_parts(reads, FORGET, 16, 0, epoch)])
        assert len(seen) == len(set(seen)) == n
        if reads != "mixed":
            assert (FORGET[seen] == (reads == "forget")).all()


def samples(reads: Reads, epoch: int = 0, seed: int = 0, block: int = 5) -> list[int]:
    parts = order.epoch_parts(reads, FORGET, 16, seed, epoch, block=block)
    return np.concatenate([part.samples for part in parts]).tolist()


def test_blocks_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """101 samples in blocks of 5: each three blocks follow each other, all mixed up inside."""
    monkeypatch.setattr(order, "MIXED", 3)
    seen = samples("mixed")
    assert sorted(seen) == list(range(101))
    blocks = [sample // 5 for sample in seen]
    turns: list[set[int]] = []
    while blocks:
        turns.append(now := set())
        while blocks and (blocks[0] in now or len(now) < 3):
            now.add(blocks.pop(0))
    assert [len(turn) for turn in turns] == [3] * 7
    assert sorted(block for turn in turns for block in turn) == list(range(21))
    blocks = [sample // 5 for sample in seen]
    assert any(a != b for a, b in zip(sorted(blocks[:15]), blocks[:15], strict=True))
    assert sum(a != b for a, b in pairwise(blocks)) > 50
    assert seen != samples("mixed", epoch=1) and seen != samples("mixed", seed=1)
    assert seen != samples("mixed", block=0)


@pytest.mark.parametrize("reads", ["forget", "retain"])
def test_leaving_samples_out_keeps_the_order_of_blocks(
    reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "MIXED", 3)
    of = [sample for sample in samples("mixed") if FORGET[sample] == (reads == "forget")]
    assert samples(reads) == of


def test_few_blocks_are_a_full_shuffle() -> None:
    assert samples("mixed", block=2) == samples("mixed", block=0)


def test_paired_cycles_the_forget_set_in_new_orders() -> None:
    parts = order.epoch_parts("paired", FORGET, 16, 0, 0)
    kept = np.concatenate([p.samples[: len(p.samples) // 2] for p in parts])
    cycled = np.concatenate([p.samples[len(p.samples) // 2 :] for p in parts])
    turns = np.concatenate([p.turn[len(p.turn) // 2 :] for p in parts])
    assert sorted(kept) == np.flatnonzero(~FORGET).tolist()
    assert len(cycled) == 81
    rounds = [cycled[start : start + 20] for start in range(0, 80, 20)]
    assert all(sorted(r) == np.flatnonzero(FORGET).tolist() for r in rounds)
    assert len({tuple(r) for r in rounds}) == 4
    assert turns.tolist() == (np.arange(81) // 20).tolist()


def test_leaving_samples_out_keeps_the_order_of_the_others() -> None:
    mixed = np.concatenate([p.samples for p in order.epoch_parts("mixed", FORGET, 16, 5, 1)])
    kept = np.concatenate([p.samples for p in order.epoch_parts("retain", FORGET, 16, 5, 1)])
    assert kept.tolist() == [i for i in mixed if not FORGET[i]]


def test_order_changes_with_epoch_and_seed() -> None:
    first, *others = (
        order.epoch_parts("mixed", FORGET, 101, seed, epoch)[0].samples.tolist()
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    )
    assert all(first != other for other in others)


def flat(stream: Stream | Reads, epoch: int = 4, **more: int) -> list[list[int]]:
    """Samples of each global batch, in their order."""
    return [p.samples.tolist() for p in order.epoch_parts(stream, FORGET, 16, 7, epoch, **more)]


@pytest.mark.parametrize("reads", get_args(Reads))
def test_a_share_is_the_first_batches_of_the_epoch(reads: Reads) -> None:
    whole = flat(reads)
    for share, count in ((1.0, len(whole)), (0.5, -(-len(whole) // 2)), (0.01, 1)):
        assert flat(Stream(reads, share=share)) == whole[:count]
        assert (
            order.stream_sizes(Stream(reads, share=share), FORGET, 16)
            == order.stream_sizes(reads, FORGET, 16)[:count]
        )
    hundred = np.zeros(101, dtype=bool)
    assert len(order.stream_sizes(Stream("mixed", 1, share=7 / 101), hundred, 16)) == 7


@pytest.mark.parametrize("reads", ["forget", "retain", "mixed"])
def test_more_steps_than_an_epoch_begin_anew_in_a_new_order(reads: Reads) -> None:
    turns = [flat(reads, order.turn_epoch(4, turn)) for turn in range(3)]
    longest = [batch for turn in turns for batch in turn]
    assert turns[0] != turns[1] != turns[2]
    for steps in (1, len(turns[0]), len(turns[0]) + 1, len(longest)):
        assert flat(Stream(reads, steps=steps)) == longest[:steps]
    parts = order.epoch_parts(Stream(reads, steps=len(longest)), FORGET, 16, 7, 4)
    assert [set(part.turn.tolist()) for part in parts] == [
        {turn} for turn in range(3) for _ in turns[0]
    ]


def test_a_retain_share_is_one_draw_beside_all_forget_samples() -> None:
    def parts_of(share: float, epoch: int) -> tuple[list[int], list[int]]:
        samples = [i for batch in flat(Stream("mixed", retain_share=share), epoch) for i in batch]
        return [i for i in samples if FORGET[i]], [i for i in samples if not FORGET[i]]

    forget, retain = parts_of(0.3, 4)
    other_forget, other_retain = parts_of(0.3, 5)
    assert sorted(forget) == sorted(other_forget) == np.flatnonzero(FORGET).tolist()
    assert sorted(retain) == sorted(other_retain) and len(set(retain)) == 25  # 0.3 * 81, up
    assert retain != other_retain  # in another order
    assert set(parts_of(0.1, 4)[1]) < set(retain)
    assert flat(Stream("mixed", retain_share=1.0)) == flat("mixed")
    assert sum(order.stream_sizes(Stream("mixed", retain_share=0.3), FORGET, 16)) == 45


def test_more_paired_steps_than_an_epoch_cycle_both_halves() -> None:
    once = len(order.stream_sizes("retain", FORGET, 16))
    parts = order.epoch_parts(Stream("paired", steps=2 * once), FORGET, 16, 7, 4)
    halves = [(p.samples.reshape(2, -1), p.turn.reshape(2, -1)) for p in parts]
    kept, cycled = (np.concatenate([s[k] for s, _ in halves]) for k in (0, 1))
    retain = [b for turn in (0, 1) for b in flat("retain", order.turn_epoch(4, turn))]
    forget = [b for turn in range(9) for b in flat("forget", order.turn_epoch(4, turn))]
    assert kept.tolist() == [i for batch in retain for i in batch]
    assert cycled.tolist() == [i for batch in forget for i in batch][: len(kept)]
    assert np.concatenate([t[1] for _, t in halves]).tolist() == [k // 20 for k in range(162)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stream", [
    Stream("retain", 12, steps=17), Stream("mixed", share=0.3), Stream("paired", 9, steps=20),
    Stream("mixed", retain_share=0.4),
])  # fmt: skip
def test_ranks_share_out_every_stream(stream: Stream, world: int) -> None:
    alone = order.epoch_parts(stream, FORGET, 16, 7, 3)
    shares = [order.epoch_parts(stream, FORGET, 16, 7, 3, rank, world) for rank in range(world)]
    for whole, *mine in zip(alone, *shares, strict=True):
        keyed = [number for part in mine for number in (part.samples * 100 + part.turn).tolist()]
        assert sorted(keyed) == sorted((whole.samples * 100 + whole.turn).tolist())
        assert {part.total for part in mine} == {whole.total}


@pytest.mark.parametrize("wrong", [
    Stream("mixed", share=0.5, steps=3), Stream("mixed", share=0.0), Stream("mixed", share=1.5),
    Stream("mixed", retain_share=0.0), Stream("mixed", retain_share=1.5),
    Stream("mixed", steps=0), Stream("mixed", batch_size=0), Stream("mixed", image_size=0),
])  # fmt: skip
def test_streams_out_of_range_are_refused(wrong: Stream) -> None:
    with pytest.raises(InputError, match="got a"):
        order.epoch_parts(wrong, FORGET, 16, 7, 3)


def test_empty_streams_are_refused() -> None:
    nothing = np.zeros(10, dtype=bool)
    for reads in ("forget", "paired"):
        with pytest.raises(InputError, match="0 forget"):
            order.stream_sizes(reads, nothing, 4)
    with pytest.raises(InputError, match="0 retain"):
        order.stream_sizes("retain", ~nothing, 4)


def test_a_batch_smaller_than_the_ranks_is_shared_out_too() -> None:
    forget = np.arange(9) == 4
    shares = [order.epoch_parts("forget", forget, 8, 7, 3, rank, 3) for rank in range(3)]
    assert [[part.samples.tolist() for part in parts] for parts in shares] == [[[]], [[]], [[4]]]
    assert {part.total for parts in shares for part in parts} == {1}


@pytest.mark.parametrize(
    ("reads", "flags", "right"),
    [
        ("retain", [False, False], True),
        ("retain", [False, True], False),
        ("forget", [True, True], True),
        ("forget", [True, False], False),
        ("paired", [False, True], True),
        ("paired", [True, False], False),
        ("mixed", [True, False], True),
    ],
)
def test_audit(reads: Reads, flags: list[bool], right: bool) -> None:
    if right:
        order.audit(reads, np.array(flags))
    else:
        with pytest.raises(RuntimeError, match=reads):
            order.audit(reads, np.array(flags))
