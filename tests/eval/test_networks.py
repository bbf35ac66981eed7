"""The networks of a table are read in turn: few at once, whatever their number; equal rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import letheon
from letheon.engine.checkpoints.model_file import load_model, save_model
from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import Precision
from letheon.engine.runs.plan import JobOptions
from letheon.errors import InputError
from letheon.eval import comparison as comparisons
from letheon.eval.attacks.session import measure_all
from letheon.eval.case import Conditions
from letheon.eval.comparison import Comparison, Entry, add_random_control, open_comparison
from letheon.eval.evaluate import Extent, Measuring
from letheon.eval.examples import find_examples
from letheon.eval.inference import networks
from letheon.eval.inference.networks import Shelf, count_bytes, count_held, find_room
from letheon.eval.inference.passes import SweepOptions
from letheon.loaders.datasets.image_set import Data
from tests.pool import on_ranks
from tests.world import PRESET, images

FULL = Extent(depth="full", relearn=2, attacks=2)
CPU: dict[str, Any] = {"device": "cpu", "precision": Precision("fp32"), "loader": "torch"}


@dataclass(frozen=True, kw_only=True)
class Job(JobOptions):
    """A job whose images are the small world's."""

    def open_data(self) -> Data:
        train, test = images(41), images(30)
        return Data(train, test, tuple((name,) for name in train.classes))


def save_all(folder: Path, count: int) -> list[Path]:
    """Save so many networks, each with weights of its own."""
    paths = [folder / f"m{seed}.safetensors" for seed in range(count)]
    for seed, path in enumerate(paths):
        model = build("small", 4, seed, PRESET)
        model.class_names = tuple(f"c{c}" for c in range(4))
        save_model(path, model)
    return paths


def opened(paths: Sequence[Path]) -> Comparison:
    """An original, two retrained models, the others as runs."""
    job = Job(**CPU)
    of = open_comparison(
        job, paths[:1], paths[1:3], paths[3:], CheckpointOptions(), "class:2", None
    )
    return add_random_control(of, 0)


def rows_of(of: Comparison, ranks: Ranks | None = None, extent: Extent = FULL) -> list[Any]:
    measuring = Measuring(Job(**CPU), of, Conditions(), extent, 16, ranks or Ranks())
    rows = measure_all(measuring).flat
    answers = find_examples(measuring.inference, [entry.name for entry in of.entries])
    return [rows, answers["answers"]]


def live() -> int:
    """Count the networks with numbers that came to life since `few`, copies of any kind too."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, Classifier)]
    return sum(not next(one.parameters()).is_meta for one in found)


class Counter:
    """Wraps what reads a network, and counts those alive when it begins."""

    def __init__(self, read: Callable[..., Classifier]) -> None:
        self.read, self.most = read, 0

    def __call__(self, *args: Any, **options: Any) -> Classifier:
        self.most = max(self.most, live())
        return self.read(*args, **options)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network stays after its turn, and each is shown the images alone."""
    gc.collect()
    gc.freeze()  # what is alive by now is neither collected nor counted
    for module in (comparisons, letheon.launch.api):
        monkeypatch.setattr(module, "Shelf", partial(Shelf, 0))
    monkeypatch.setattr("letheon.eval.evaluate.find_room", lambda ranks: 0)


@pytest.mark.parametrize(
    ("extent", "limit"), [(Extent(), 0), pytest.param(FULL, 2, marks=pytest.mark.slow)]
)
def test_networks_alive_do_not_grow_with_the_table(
    extent: Extent, limit: int, few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None when the next is read; of an attack two at most, the row's and the original."""
    paths, most = save_all(tmp_path, 7), []
    for count in (4, 7):
        counter = Counter(load_model)
        monkeypatch.setattr(comparisons, "load_model", counter)
        monkeypatch.setattr("letheon.engine.checkpoints.options.load_model", counter)
        rows_of(opened(paths[:count]), extent=extent)
        most.append(counter.most)
    assert most[0] == most[1] <= limit


@pytest.mark.slow
def test_from_python_they_do_not_either(
    few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths, most = save_all(tmp_path, 7), []
    for count in (4, 7):
        counter = Counter(load_model)
        monkeypatch.setattr("letheon.engine.checkpoints.model_file.load_model", counter)
        letheon.evaluate(
            original=paths[0], retrained=paths[1:3], unlearned=paths[3:count], train=images(41),
            test=images(30), forget="class:2", extent=FULL, **CPU,
        )  # fmt: skip
        most.append(counter.most)
    assert most[0] == most[1] and 0 < most[0] <= 2


def held(of: Comparison) -> Comparison:
    """The same comparison with every network in memory."""
    entries = [replace(one, model=one.open(), source=None) for one in of.entries]
    return replace(of, entries=entries)


@pytest.mark.slow
def test_rows_are_those_of_networks_in_memory(few: None, tmp_path: Path) -> None:
    of = opened(save_all(tmp_path, 5))
    assert all(next(one.model.parameters()).is_meta for one in of.entries)
    assert rows_of(of) == rows_of(held(of))


def of_ranks(ranks: Ranks, paths: list[Path]) -> list[Any]:
    """The rows, and what every rank says of a file that one of them finds changed."""
    rows = rows_of(opened(paths), ranks)[0]
    of = opened(paths)
    lost = replace(of.entries[0], source=broken if ranks.rank == 1 else of.entries[0].source)
    try:
        rows_of(replace(of, entries=[lost, *of.entries[1:]]), ranks)
    except InputError as error:
        return [rows, str(error)]
    return [rows, "nothing was raised"]


def broken() -> Classifier:
    raise InputError("got m0, which cannot be read")


@pytest.mark.slow
def test_ranks_read_each_in_turn_and_fail_together(tmp_path: Path) -> None:
    paths = save_all(tmp_path, 4)
    known = {row["name"]: row["FA"] for row in rows_of(opened(paths))[0]}
    for rows, line in on_ranks(2, of_ranks, paths):
        assert {row["name"]: row["FA"] for row in rows} == known
        assert line == "got m0, which cannot be read"


def test_a_file_that_is_changed_meanwhile_is_refused(few: None, tmp_path: Path) -> None:
    paths = save_all(tmp_path, 4)
    of = opened(paths)
    save_model(paths[3], build("small", 4, 99, PRESET))
    with pytest.raises(InputError, match=r"got m3 with the weights .* evaluate again"):
        rows_of(of)


def test_stored_outputs_need_no_network(
    few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With --cache the second table reads the files once, to verify them, and not for a pass."""
    paths = save_all(tmp_path, 4)
    extent = Extent(cache=tmp_path / "cache")
    measuring = Measuring(Job(**CPU), opened(paths), Conditions(), extent, 16, Ranks())
    rows = measuring.measure().flat
    again = opened(paths)
    lost = [replace(entry, source=broken) for entry in again.entries]
    assert replace(measuring, comparison=replace(again, entries=lost)).measure().flat == rows


@pytest.mark.parametrize("fails", [False, True])
def test_no_network_stays_on_the_device(
    fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once its sets were shown, or showing them failed."""
    places: dict[int, list[str]] = {}

    def to(self: Classifier, place: Any) -> Classifier:
        places.setdefault(id(self), []).append(str(place))
        return self

    def show(swept: Sequence[Any], *_: Any) -> list[Any]:
        assert all(places[id(each.model)] == ["cuda"] for each in swept)
        if fails:
            raise InputError("got an image that cannot be read")
        return []

    of = held(opened(save_all(tmp_path, 3)))
    read = Measuring(Job(**CPU), of, Conditions(), Extent(), 16, Ranks()).inference
    read = replace(read, ranks=replace(read.ranks, device="cuda"))  # type: ignore[arg-type]
    monkeypatch.setattr(Classifier, "to", to)
    monkeypatch.setattr("letheon.eval.evaluate.sweep_together", show)
    monkeypatch.setattr(type(read), "loader", lambda *_: None)
    monkeypatch.setattr(type(read), "_options", lambda *_: SweepOptions())
    with pytest.raises(InputError) if fails else nullcontext():
        read.sweep(of.entries)
    assert list(places.values()) == [["cuda", "cpu"]] * 4


def test_the_first_networks_of_a_table_are_kept() -> None:
    size = count_bytes(build("small", 4, 0, PRESET))
    shelf = Shelf(2 * size)
    first, second, third = (
        [shelf.open(name, lambda: build("small", 4, 0, PRESET)) for _ in range(2)]
        for name in ("a", "b", "c")
    )
    assert first[0] is first[1] and second[0] is second[1] and third[0] is not third[1]
    with torch.device("meta"):
        assert count_bytes(build("small", 4, 0, PRESET)) == size


def test_the_plan_counts_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folded copy of each in a group, and what is kept: here the two that fit."""
    entries = [Entry(str(i), "", build("small", 4, i, PRESET), "") for i in range(5)]
    size = count_bytes(entries[0].model)
    assert count_held([entries]) == 10 * size
    monkeypatch.setattr(networks, "ROOM", 2 * size)
    monkeypatch.setattr(networks, "Shelf", partial(Shelf, 2 * size))
    assert count_held([[entry] for entry in entries]) == 2 * size + 2 * size
    assert find_room(Ranks()) > 0
