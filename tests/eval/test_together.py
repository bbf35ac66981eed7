"""Models that are shown each image together answer bit for bit as each does alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.errors import InputError
from letheon.eval.comparison import Entry
from letheon.eval.inference.networks import group_entries
from letheon.eval.inference.passes import Store, SweepOptions, Swept, sweep_together
from letheon.eval.inference.taps import stages
from letheon.eval.outputs import Outputs
from letheon.loaders.preset import Preset
from tests.eval.sweeping import refuse_image, sweep
from tests.eval.test_features import CLASSES, loader
from tests.pool import on_ranks


def equal(a: Outputs, b: Outputs) -> bool:
    columns = [(getattr(a, c), getattr(b, c)) for c in ("features", "logits", "labels", "index")]
    columns += [(a.taps[name], b.taps[name]) for name in a.taps]
    return list(a.taps) == list(b.taps) and all(torch.equal(x, y) for x, y in columns)


def together(ranks: Ranks, folder: Path | None = None) -> list[bool]:
    """Whether every set of every model is the same: fresh, and once more where it is stored."""
    models = [build("small", CLASSES, seed=seed) for seed in (1, 2, 3)]
    swept = [Swept(str(i), model, f"w{i}", stages(model)[:i]) for i, model in enumerate(models)]
    loaders = {"train": loader(ranks), "test": loader(ranks, 30), "few": loader(ranks)}
    options = SweepOptions(flip=True, parts={"few": [8, 5, 8]})
    alone = [sweep(each, loaders, ranks, options) for each in swept]
    if folder is not None:
        known = {"train": ("a", 47), "test": ("b", 30), "few": ("a", 47)}
        options = replace(options, store=Store(folder / str(ranks.world), known))
        sweep_together(swept[1:2], loaders, ranks, options)  # one of them is stored already
    found = []
    for _ in range(2):
        joint = sweep_together(swept, loaders, ranks, options)
        for one, two in zip(alone, joint, strict=True):
            assert (one.name, one.weights) == (two.name, two.weights)
            found += [equal(one.outputs[key], two.outputs[key]) for key in loaders]
    return found


def unreadable(ranks: Ranks) -> str:
    read = loader(ranks)
    refuse_image(read, 46)
    try:
        swept = [Swept(str(seed), build("small", CLASSES, seed=seed)) for seed in (1, 2)]
        sweep_together(swept, {"train": read, "test": loader(ranks, 30)}, ranks)
    except InputError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("world", "stored"),
    [
        (1, True),
        (2, False),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [(1, False), (2, True)]),
    ],
)
def test_together_is_each_alone(world: int, stored: bool, tmp_path: Path) -> None:
    for found in on_ranks(world, together, tmp_path if stored else None):
        assert len(found) == 18 and all(found)


@pytest.mark.parametrize("world", [1, 2])
def test_an_unreadable_image_stops_every_rank(world: int) -> None:
    assert set(on_ranks(world, unreadable)) == {"got image 46, which cannot be read"}


def test_each_image_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    train = loader(Ranks())
    inner = train.images.read_many
    monkeypatch.setattr(train.images, "read_many", lambda i: read.extend(i) or inner(i))
    swept = [Swept(str(seed), build("small", CLASSES, seed=seed)) for seed in (1, 2, 3)]
    sweep_together(swept, {"train": train, "test": loader(Ranks(), 30)}, Ranks())
    assert sorted(read) == list(range(47))


def test_groups_have_one_preset_and_fit_in_memory() -> None:
    model = build("small", CLASSES)
    other = build("small", CLASSES, preset=Preset(64))
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    of_one = 4 * 100 * (model.head.in_features + CLASSES) + 2 * 4 * numbers  # with its copy
    of_one += 2 * 4 * sum(t.dtype == torch.int64 for t in model.state_dict().values())
    entries = [Entry(str(i), "", net, "") for i, net in enumerate([model] * 5 + [other] * 2)]

    def sizes(room: int) -> list[int]:
        groups = group_entries(entries, 100, room)
        assert [e for group in groups for e in group] == entries
        return [len(group) for group in groups]

    assert sizes(10 * of_one) == [5, 2]
    assert sizes(2 * of_one) == [2, 2, 1, 2]
    assert sizes(0) == [1] * 7
