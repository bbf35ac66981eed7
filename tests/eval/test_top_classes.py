"""Rankings by the original: against their definition, and the same however the work is shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.eval.outputs import Outputs
from letheon.eval.top_classes import rank_classes, sum_shares
from letheon.launch import options
from letheon.launch.options import Forgetting
from letheon.loaders.shared_work import share_by, spans


def answers(rows: slice = slice(None)) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 6, generator=generator), torch.arange(60) % 4
    logits[torch.arange(60), labels + 1] += 1
    index = torch.arange(60)
    whole = Outputs(torch.zeros(60, 2), logits, labels, labels < 0, index)
    return whole.where(index[rows])


def test_first_the_best_of_each_class_by_strength_then_the_second_choices() -> None:
    whole = answers()
    z = whole.logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    means = np.stack([p[whole.labels.numpy() == c].mean(axis=0) for c in range(4)])
    order = np.argsort(-means, axis=1)
    expected: dict[int, None] = {}
    for choice in range(6):
        best = order[:, choice]
        for row in np.argsort(-means[np.arange(4), best]):
            expected.setdefault(int(best[row]))
    assert rank_classes([sum_shares(whole)]) == list(expected)
    # Parts add up exactly, whatever their order.
    parts = [answers(slice(56, 60)), answers(slice(0, 23)), answers(slice(23, 56))]
    assert rank_classes([sum_shares(part) for part in parts]) == list(expected)


def deal(name: str, items: Sequence[Any], compute: Callable[[Any], Any]) -> list[Any]:
    """As several ranks would: in another order, each on its own."""
    assert len(items) > 1
    return [compute(item) for item in reversed(items)][::-1]


@pytest.mark.parametrize("forget", ["hardest:30", "easiest:30,confidence", "top:3"])
def test_a_ranking_does_not_depend_on_how_it_is_shared_out(
    forget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "BATCH", 40)
    settings = Forgetting(weights=Path(), forget=forget, downstream="digits", device="cpu")
    data = settings.open_data()
    model = build("small", len(data.classes), 0)
    alone = settings.rank(model, data, Ranks())
    with share_by(deal):
        assert settings.rank(model, data, Ranks()) == alone
    assert alone is not None and len(alone) == (10 if forget == "top:3" else len(data.train))


def test_spans_cover_everything_once() -> None:
    assert [*map(len, spans(10, 4))] == [4, 4, 2] and spans(0, 4) == []
    assert [n for span in spans(10, 4) for n in span] == [*range(10)]
