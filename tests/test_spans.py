"""Spans add up to the time that passed; unrecorded and in other threads they do nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from letheon import spans
from letheon.spans import OUTSIDE, Recorder, span, waits


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves: seconds of the wall; the processor has half of them."""
    now = [0.0]
    monkeypatch.setattr(spans.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(spans.time, "process_time", lambda: now[0] / 2)
    return now


def test_inner_time_is_not_outer_time_and_all_of_it_adds_up(clock: list[float]) -> None:
    def batches() -> Iterator[int]:
        for i in range(2):
            clock[0] += 4
            yield i

    @span("saving")
    def save(depth: int) -> None:
        clock[0] += 1
        if depth:
            save(depth - 1)

    with Recorder(waited=3.0) as recorder:
        clock[0] += 10
        with span("compute"):
            for _ in waits("data", batches()):
                clock[0] += 100
            save(1)
        with span("validation", whole=True):
            for _ in waits("data", batches()):
                clock[0] += 1000
    clock[0] += 5000
    assert recorder.wall == {
        OUTSIDE: 13, "compute": 200, "data": 8, "saving": 2, "validation": 2008,
    }  # fmt: skip
    assert recorder.processor["data"] == 4 and recorder.processor[OUTSIDE] == 5


def test_an_error_closes_the_spans(clock: list[float]) -> None:
    with Recorder() as recorder:
        with pytest.raises(KeyError), span("compute"), span("data"):
            clock[0] += 1
            raise KeyError
        clock[0] += 7
    assert recorder.wall == {OUTSIDE: 7, "compute": 0, "data": 1}


def test_nobody_records_and_other_threads_are_not_recorded(clock: list[float]) -> None:
    assert list(waits("data", [1, 2])) == [1, 2]

    def work() -> None:
        with span("data"):
            clock[0] += 1

    with Recorder() as recorder, span("compute"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert recorder.wall == {OUTSIDE: 0, "compute": 1}
