"""Which of several originals models are compared with: the one they were made from, if it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import letheon
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.engine.runs.run_folder import FINISHED
from letheon.errors import InputError
from letheon.eval.comparison import Entry, assemble_comparison
from letheon.eval.references import read_start
from letheon.launch.evaluate import Settings
from letheon.launch.jobs.find_runs import RunFolders
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import Request
from letheon.sealed import read_sealed, seal
from tests.eval.test_features import CLASSES, loader


def images(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, 3, 8, 8, generator=draw), torch.arange(count) % 4)


TRAIN, TEST = images(60, 0), images(24, 1)


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


def measure(originals: Any, unlearned: Any, **options: Any) -> Any:
    return letheon.evaluate(
        train=TRAIN, test=TEST, original=originals, retrained=[net(8), net(9)],
        unlearned=unlearned, forget="class:1", device="cpu", accept_chance=True, **options,
    )  # fmt: skip


def test_the_original_of_all_runs_is_compared_with_wherever_it_is_listed(tmp_path: Path) -> None:
    forgot = letheon.forget(
        net(2), method="no-op", train=TRAIN, test=TEST, forget="class:1", out=tmp_path / "no-op",
        device="cpu", accept_chance=True,
    )  # fmt: skip
    assert read_start(tmp_path / "no-op") == read_sealed(tmp_path / "no-op" / "run.json")["weights"]
    rows = measure([net(1), net(2), net(3)], forgot, depth="quick")
    found = {row["name"]: row for row in rows}
    assert [row["name"] for row in rows][:3] == ["original-2", "original", "original-3"]
    assert found["no-op"]["cka_original"] == pytest.approx(1)
    assert found["original"]["cka_original"] < 0.999


def test_runs_of_several_originals_leave_the_order_and_are_named() -> None:
    model = build("small", CLASSES)
    sets = Data(loader(Ranks()).images, loader(Ranks(), 30).images, ())
    whole = [
        Entry("a", "original", model, "A"),
        Entry("b", "original", model, "B"),
        Entry("r", "retrained", model, "R", start="B"),
        Entry("u", "unlearned", model, "U", start="B"),
        Entry("v", "control", model, "V"),
    ]
    request = Request("class:2", (2,), None, "d")

    def assembled(*more: Entry) -> Any:
        return assemble_comparison([*whole, *more], sets, {}, request)

    one = assembled()
    assert [e.name for e in one.entries] == ["b", "a", "r", "u", "v"] and one.warnings == []
    first, second = assembled(
        Entry("w", "unlearned", model, "W", start="B"),
        Entry("x", "unlearned", model, "X", start="A"),
        Entry("y", "unlearned", model, "Y", start="elsewhere"),
    ).warnings
    assert first.startswith("u, w: made from b, compared with a")
    assert second.startswith("y: made from another original, compared with a")


@pytest.mark.slow
def test_an_original_whose_outputs_are_not_finite_is_no_ones_original() -> None:
    """Otherwise FA, the attacks and CKA would be beside different originals, or none."""
    bad, good = net(1), [net(2), net(3)]
    with torch.no_grad():
        bad[0].weight.mul_(1e3)
        bad[4].weight.mul_(3e38)
    options: Any = {"depth": "full", "relearn": 2, "attacks": 1}
    beside, without = (measure([*some, *good], net(5), **options) for some in ([bad], []))
    assert "original" in beside.left_out and not without.left_out
    one, other = beside[-1], without[-1]
    assert one["role"] == "unlearned" and other["cka_original"] is not None
    assert {key for key, value in other.items() if value != one.get(key)} == set()


def test_one_original_is_found_besides_those_that_are_named(tmp_path: Path) -> None:
    runs = RunFolders((tmp_path / "a", tmp_path / "b"), (), ())
    assert runs.find_original([tmp_path / "c" / ".." / "b"]) == tmp_path / "a"
    assert RunFolders((), (), ()).find_original() is None
    with pytest.raises(InputError, match=r"got 2 original models .*\(a, b\); expected one"):
        runs.find_original()


def test_a_folder_of_several_originals_is_measured_where_one_is_named(tmp_path: Path) -> None:
    for name, kind in (("a", "training"), ("b", "training"), ("r", "reference"), ("u", "control")):
        (tmp_path / name).mkdir()
        (tmp_path / name / FINISHED).write_bytes(seal({"kind": kind}))
    beside = Settings(folder=tmp_path, original=tmp_path / "a", other_originals=(tmp_path / "b",))
    found = beside.expand()
    assert found.original == tmp_path / "a" and found.other_originals == (tmp_path / "b",)
    assert found.retrained == (tmp_path / "r",) and found.runs == (tmp_path / "u",)
    assert Settings(folder=tmp_path, original=tmp_path / "b").expand().original == tmp_path / "b"
    one = Settings(folder=tmp_path, other_originals=(tmp_path / "a",)).expand()
    assert one.original == tmp_path / "b"
    with pytest.raises(InputError, match="got 2 original models"):
        Settings(folder=tmp_path).expand()
