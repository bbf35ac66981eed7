"""Rankings by the original: as defined, the same on any ranks, and after a stop at any batch."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from letheon.engine.checkpoints.sweep_state import Sweeps
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.engine.runs.stop import Poll
from letheon.eval import top_classes
from letheon.eval.top_classes import Ranker
from letheon.launch import options
from tests.engine.resume_tools import Break, BreakAt
from tests.eval.test_features import CLASSES, loader
from tests.launch_tools import Scripts
from tests.pool import on_ranks

SMALL = 10
KINDS = ("loss", "confidence", "classes")


def rank(ranks: Ranks, kind: str, sweeps: Sweeps | None = None) -> list[int]:
    """A ranking by an untrained network of 47 images, or of its classes by 47 and by 30."""
    before, top_classes.BATCH = top_classes.BATCH, SMALL
    try:
        ranker = Ranker(build("small", CLASSES, seed=3), ranks, sweeps)
        if kind == "classes":
            return ranker.rank_classes([(loader(Ranks(), n, SMALL), n, CLASSES) for n in (47, 30)])
        return ranker.rank_samples(loader(Ranks(), 47, SMALL), 47, kind)
    finally:
        top_classes.BATCH = before


def rank_after_stops(ranks: Ranks, folder: Path) -> list[tuple[str, int]]:
    """The rankings that another end followed from, by where they were stopped; batches of each."""
    odd = []
    for kind in KINDS:
        whole = rank(ranks, kind)
        for stop in range(1, sys.maxsize):
            place = folder / kind / str(stop)
            polls = [BreakAt(ranks, 1, stop), BreakAt(ranks, 1, sys.maxsize)]
            ended = None
            for poll in polls:
                sweeps = Sweeps(place, poll, place)
                assert sweeps.load({}) == (poll is polls[1])
                try:
                    ended = rank(ranks, kind, sweeps)
                    break
                except Break:
                    sweeps.close()
            if ended != whole:
                odd.append((kind, stop))
            if poll is polls[0]:
                break
            first, last = (one.taken for one in polls)
            assert first == stop + 1 and last >= 1, "the second began where the first was stopped"
        odd.append((kind, stop))
    return odd


def shares_of(count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities and labels of so many images, by a plain forward pass."""
    batches = [*loader(Ranks(), count).sweep()]
    model = build("small", CLASSES, seed=3).eval()
    with torch.no_grad():
        logits = torch.cat([model(batch.images).logits for batch in batches]).double().numpy()
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


def test_as_defined() -> None:
    shares, labels = shares_of(47)
    loss = -np.log(shares[np.arange(47), labels])
    assert rank(Ranks(), "loss") == np.argsort(-loss, kind="stable").tolist()
    assert rank(Ranks(), "confidence") == np.argsort(shares.max(1), kind="stable").tolist()
    # First the best of each class by strength, then the second choices.
    others, names = shares_of(30)
    shares, labels = np.concatenate([shares, others]), np.concatenate([labels, names])
    means = np.stack([shares[labels == c].mean(0) for c in range(CLASSES)])
    order, expected = np.argsort(-means, axis=1), dict[int, None]()
    for best in order.T:
        for row in np.argsort(-means[np.arange(CLASSES), best], kind="stable"):
            expected.setdefault(int(best[row]))
    assert rank(Ranks(), "classes") == [*expected]


@pytest.mark.slow
def test_one_and_two_ranks_stopped_anywhere(tmp_path: Path) -> None:
    """Three batches on one of two ranks and two on the other, five on one."""
    alone = [rank(Ranks(), kind) for kind in KINDS]
    assert rank_after_stops(Ranks(), tmp_path / "1") == [
        ("loss", 5), ("confidence", 5), ("classes", 8),
    ]  # fmt: skip
    stops = [("loss", 3), ("confidence", 3), ("classes", 5)]
    assert on_ranks(2, rank_after_stops, tmp_path / "2") == [stops, stops]
    for number, kind in enumerate(KINDS):
        assert on_ranks(2, rank, kind) == [alone[number]] * 2


def test_a_run_goes_on_with_its_ranking(
    tmp_path: Path, scripts: Scripts, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("forget", "--weights", original, "--data", "digits", "--forget", "hardest:30")
    args = (*args, "--save-every", "2steps", "--out", tmp_path / "run")
    short = ("finetune", "--epochs", "1", "--batch-size", "64")

    class Signals(Poll):
        taken = 0

        def after_step(self, *broken: Callable[[], bool]) -> int:
            self.taken += 1
            if self.taken == 4:
                signal.raise_signal(signal.SIGTERM)
            return super().after_step(*broken)

    with monkeypatch.context() as patch:
        patch.setattr(options, "Poll", Signals)
        ended = scripts(*args, *short)
    assert ended.code == 75 and "after 4 of 6 batches" in ended.err, ended.err
    assert not (tmp_path / "run").exists()
    ended = scripts(*args, *short)
    assert ended.code == 0 and "goes on with the ranking" in ended.err
    assert not [*tmp_path.glob(".run*")]
    assert scripts(*args[:-1], tmp_path / "whole", *short).code == 0
    for name in ("request.json", "weights.safetensors"):
        ours, theirs = ((tmp_path / run / name).read_bytes() for run in ("run", "whole"))
        assert ours == theirs
