"""Statistics of a table of methods: each computed once, and its images decoded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from letheon.engine import statistics
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.numbers.image_memory import ImageMemory
from letheon.engine.recipe import Recipe
from letheon.engine.runs.together import Member, run_together
from letheon.engine.statistics import absolute_gradient_sum, class_moments, squared_gradient_sum
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Batch, Reader
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.open import open_source
from letheon.loaders.preset import Preset
from letheon.methods.finetune import Finetune, cross_entropy
from tests.methods.cases import cases
from tests.world import PRESET, run_of, weights
from tests.world import images as noise

RECIPE = Recipe(epochs=2, lr=0.01, batch_size=7)
NAMES = ("fisher", "fisher-golatkar", "ssd", "lfssd", "sfron", "salun", "influence", "scar", "duck",
         "cmf", "l2ul", "esc", "kodge")  # fmt: skip
METHODS = {name: method for name, method in cases(RECIPE).items() if name in NAMES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """The small world's images, each a file that has to be decoded."""
    root, world = tmp_path_factory.mktemp("files"), noise()
    for number, label in enumerate(world.labels):
        place = root / f"c{label}" / f"{number:02}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(world.pixels[number]).save(place)
    found = open_source(str(root))
    assert isinstance(found, dict)
    return next(iter(found.values()))


def loader_of(files: ImageSet, batch_size: int, rank: int = 0, world: int = 1) -> TorchLoader:
    return TorchLoader(files, files.labels == 2, PRESET, batch_size, Reader(0, rank, world))


def made(method: Method, files: ImageSet) -> Run:
    torch.manual_seed(1)
    run = run_of(method)
    run.loader = loader_of(files, method.recipe.batch_size)
    run.forget = torch.from_numpy(files.labels == 2)
    return run


class Counts:
    """How many images were decoded, and which sums were computed, while runs could share them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, self.sums = 0, list[tuple[object, ...]]()
        self.swept = 0  # of the images, those with the test transform
        plain, sweep = TorchLoader.make_batches, statistics.batches

        def decode(
            loader: TorchLoader, parts: list[Any], epoch: int | None, preset: Preset
        ) -> Iterator[Batch]:
            count = sum(len(part.samples) for part in parts)
            self.images += count
            self.swept += count if epoch is None else 0
            return plain(loader, parts, epoch, preset)

        def add(run: Run, part: Any, name: str = "", *of: Any, **more: Any) -> Iterator[Batch]:
            if run.shared is not None and name:
                self.sums.append((name, part))
            return sweep(run, part, name, *of, **more)

        monkeypatch.setattr(TorchLoader, "make_batches", decode)
        monkeypatch.setattr(statistics, "batches", add)


def test_a_table_costs_little_more_than_its_slowest_method(
    files: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By images decoded, over preparation and training; every weight is that of the run alone."""
    counts, alone, ends = Counts(monkeypatch), dict[str, int](), dict[str, Any]()
    for name, method in METHODS.items():
        counts.images, run = 0, made(method, files)
        run_method(method, run)
        alone[name], ends[name] = counts.images, weights(run)
    counts.images = counts.swept = 0
    memory, shared, found = ImageMemory(10**6), dict[Any, Any](), dict[str, Any]()

    def member(name: str) -> Member:
        def start() -> Any:
            run = replace(made(METHODS[name], files), shared=shared, image_memory=memory)
            return run, lambda *of, **facts: None, None

        return Member(name, METHODS[name], start, lambda run, _: found.update({name: weights(run)}))

    assert not run_together([member(name) for name in METHODS], Ranks())
    assert set(METHODS) == set(NAMES) and counts.swept == len(files)
    assert counts.images <= 1.5 * max(alone.values()) and counts.images < sum(alone.values()) / 3
    assert len(set(counts.sums)) == len(counts.sums) > 15
    for name, end in ends.items():
        assert all(torch.equal(found[name][key], value) for key, value in end.items()), name


@pytest.mark.parametrize("limit", [0, 3000, 10**6])
def test_kept_images_make_the_batches_of_the_loader(files: ImageSet, limit: int) -> None:
    memory = ImageMemory(limit)
    rng = np.random.default_rng(0)
    for batch_size, rank, world in ((7, 0, 1), (5, 1, 3), (41, 0, 1)):
        loader = loader_of(files, batch_size, rank, world)
        for skip in (0, 1):
            chosen = np.sort(rng.permutation(41)[:20]).tolist()
            pairs = zip(memory.sweep(loader, chosen, skip), loader.sweep(chosen, skip), strict=True)
            for ours, theirs in pairs:
                assert ours.total == theirs.total
                for a, b in zip(ours[:4], theirs[:4], strict=True):
                    assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


def test_a_sum_that_the_cut_into_batches_changes_is_not_shared(files: ImageSet) -> None:
    runs = [made(Finetune(Recipe(batch_size=size)), files) for size in (32, 64, 7)]
    shared: dict[Any, Any] = {}
    for run in runs:
        run.shared = shared
    one, two, three = (squared_gradient_sum(run, "retain", cross_entropy) for run in runs)
    assert one is two and one is not three
    one, two, three = (absolute_gradient_sum(run, "all", cross_entropy, "batch") for run in runs)
    assert one is not two and two is not three
    runs[1].recipe = runs[0].recipe
    runs[1].model.head.requires_grad_(False)  # class moments are of the weights alone
    assert class_moments(runs[0], "retain") is class_moments(runs[1], "retain")
