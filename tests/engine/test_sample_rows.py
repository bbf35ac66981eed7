"""Rows that methods keep of forget samples: each on one rank alone, and right in every batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.memory.sample_rows import SampleRows
from letheon.engine.recipe import Recipe
from letheon.engine.runs import plan
from letheon.engine.runs.plan import check_rows
from letheon.errors import InputError
from letheon.loaders.batch import Batch
from letheon.methods.amun import AdversarialState, Amun
from letheon.methods.duck import Duck
from letheon.methods.l2ul import L2ul
from letheon.methods.scar import Scar
from letheon.methods.spotter import Spotter
from tests.pool import on_ranks
from tests.world import run_of

RECIPE = Recipe(epochs=2, batch_size=7, lr=0.05, batch_norm="frozen")
METHODS = [
    Amun(RECIPE, radius=1.0, doublings=2, steps=3),
    L2ul(RECIPE, images=3, beside=2, steps=2, until=0.0),
    Spotter(RECIPE),
    Duck(RECIPE, until=0.0),
    Scar(RECIPE, until=0.0),
]
SETS = [[*range(2, 41, 3)], [5, 17]]  # of the second some batch has fewer samples than three ranks
BATCHES = [  # samples of each of three ranks: none, twice the same, all from one rank
    [[3, 30, 9], [27], [12, 0]],
    [[], [18, 18, 6], [21]],
    [[0, 3], [0, 3], []],
]


def batch_of(samples: list[int]) -> Batch:
    index = torch.tensor(samples, dtype=torch.int64)
    return Batch(torch.zeros(len(index), 1), index, index > 0, index, 6)


def attach_to_all(ranks: Ranks) -> list[tuple[list[int], list[int]]]:
    """Rows of every third sample of 31: (sample, 100 + sample), (sample, 200 + sample)."""
    own = torch.tensor([[0, 30, 9, 3], [], [21, 18, 27, 12, 6]][ranks.rank], dtype=torch.int64)
    rows = torch.stack([torch.stack([own, own + 100 * k], dim=1) for k in (1, 2)], dim=1)
    shared = SampleRows.share(own, rows, 31, ranks)
    last = shared.of_columns(torch.tensor([1]))
    got = []
    for parts in BATCHES:
        batch, wanted = batch_of(parts[ranks.rank]), [np.array(one, np.int64) for one in parts]
        both = [shared.attach(batch, known).rows for known in (wanted, None)]
        assert both[0] is not None and both[1] is not None and torch.equal(*both)
        one = last.attach(batch, wanted).rows
        assert one is not None
        got.append((both[0].tolist(), one.tolist()))
    return got


def test_a_batch_gets_its_rows_from_the_ranks_that_own_them() -> None:
    for rank, batches in enumerate(on_ranks(3, attach_to_all)):
        for parts, (rows, last) in zip(BATCHES, batches, strict=True):
            samples = parts[rank]
            assert rows == [[[s, s + 100], [s, s + 200]] for s in samples]
            assert last == [[[s, s + 200]] for s in samples]


def prepare_and_train(ranks: Ranks) -> list[tuple[list[Tensor], list[list[float]]]]:
    """Of each method: what it keeps of samples (rows, their places), and the losses of runs."""
    found = []
    for method in METHODS:
        state = method.prepare(run_of(method, ranks, forgotten=SETS[0]))
        if isinstance(state, AdversarialState):
            kept = [state.images.own, state.place]
        else:
            kept = [torch.empty(0), state.targets]  # type: ignore[attr-defined]
        losses = []
        for chosen in SETS if method.name in ("amun", "l2ul") else []:
            lines: list[dict[str, Any]] = []
            run_method(
                method,
                run_of(method, ranks, forgotten=chosen),
                lambda kind, lines=lines, **numbers: lines.append({"kind": kind, **numbers}),
            )
            losses.append([line["loss"] for line in lines if line["kind"] == "phase"])
        found.append((kept, losses))
    return found  # type: ignore[return-value]


def test_ranks_keep_their_share_and_end_alike() -> None:
    truth = prepare_and_train(Ranks())
    for method, whole, *shares in zip(METHODS, truth, *on_ranks(3, prepare_and_train), strict=True):
        rows, place = whole[0]
        for (_, own_place), losses in shares:
            assert torch.equal(own_place, place)
            for mine, alone in zip(losses, whole[1], strict=True):
                assert mine == pytest.approx(alone, rel=2e-5, abs=2e-5)
        sizes = [len(kept[0]) for kept, _ in shares]
        assert sum(sizes) == len(rows) and max(sizes) - min(sizes) <= 1
        torch.testing.assert_close(torch.cat([kept[0] for kept, _ in shares]), rows)
        assert (len(rows) > 0) == (method.name in ("amun", "l2ul", "spotter"))


def test_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 forget samples of 3 x 8 x 8 float32, three images of each."""
    method = L2ul(RECIPE, images=3, beside=2)
    run = run_of(method)
    needed = 10 * 3 * 4 * 3 * 8 * 8
    monkeypatch.setattr(plan, "free_bytes", lambda device: needed)
    check_rows(method, run)
    monkeypatch.setattr(plan, "free_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match="l2ul keeps of a rank's share.* start more ranks"):
        check_rows(method, run)
    check_rows(method, replace(run, ranks=Ranks(world=1), forget=torch.zeros(41).bool()))
