"""Stored outputs are those of a fresh pass, come back without one, and are never stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.errors import InputError
from letheon.eval.inference.cache import Cache, Facts
from letheon.eval.inference.extract import InferenceOptions, extract
from letheon.eval.outputs import Outputs
from tests.eval.test_features import CLASSES, loader

FACTS = {"weights": "w", "data": "d"}


TAPS = ("net.conv1", "net.conv2")


def stored(
    folder: Path, ranks: Ranks, seed: int = 3, facts: Facts = FACTS, **changed: Any
) -> Outputs:
    model = build("small", CLASSES, seed=seed)
    options = InferenceOptions(**{"taps": TAPS, **changed})
    return Cache(folder, facts, 47).extract(model, loader(ranks), ranks, options)


def same(a: Outputs, b: Outputs) -> None:
    for name in ("labels", "forget", "index"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    for name in ("features", "logits"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    assert list(a.taps) == list(b.taps)
    for name in a.taps:
        torch.testing.assert_close(a.taps[name], b.taps[name])


@pytest.mark.parametrize("indices", [None, (40, 3, 17, 3)])
def test_first_and_second_time_equal_a_fresh_pass(
    tmp_path: Path, indices: tuple[int, ...] | None
) -> None:
    model = build("small", CLASSES, seed=3)
    fresh = extract(model, loader(Ranks()), Ranks(), InferenceOptions(indices, taps=TAPS))
    same(stored(tmp_path, Ranks(), indices=indices), fresh)
    # Another network under the same facts: what comes back can only be what was stored.
    same(stored(tmp_path, Ranks(), seed=8, indices=indices), fresh)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"facts": {"weights": "other", "data": "d"}},
        {"facts": {"weights": "w", "data": "other"}},
        {"taps": ()},
        {"indices": (1, 2)},
    ],
)
def test_whatever_changes_makes_a_new_pass(tmp_path: Path, changed: dict[str, Any]) -> None:
    stored(tmp_path, Ranks())
    other = stored(tmp_path, Ranks(), seed=8, **changed)
    model = build("small", CLASSES, seed=8)
    fresh = extract(model, loader(Ranks()), Ranks(), InferenceOptions(changed.get("indices")))
    torch.testing.assert_close(other.logits, fresh.logits)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_pass_that_fails_leaves_nothing(tmp_path: Path) -> None:
    read = loader(Ranks())
    model = build("small", CLASSES)
    modes = [module.training for module in model.modules()]

    def refuse(indices: object) -> None:
        raise InputError("got image 3, which cannot be read")

    read.images.read_many = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(InputError, match="image 3"):
        Cache(tmp_path, FACTS, 47).extract(model, read, Ranks())
    assert list(tmp_path.iterdir()) == []
    assert [module.training for module in model.modules()] == modes


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another folder"):
        stored(tmp_path / "file", Ranks())


def test_writing_to_the_tensors_leaves_the_files(tmp_path: Path) -> None:
    first = stored(tmp_path, Ranks())
    before = first.logits.clone()
    first.logits.zero_()
    assert torch.equal(stored(tmp_path, Ranks()).logits, before)
