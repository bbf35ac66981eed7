"""Everything that runs on several ranks: 1, 2 and 3 of them give one answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.errors import InputError
from letheon.eval.inference.extract import InferenceOptions, extract
from letheon.eval.inference.passes import Swept
from letheon.eval.metrics.knn import knn
from letheon.eval.quick_row import measure
from letheon.eval.search.neighbors import nearest
from tests.eval.sweeping import sweep
from tests.eval.test_features import CLASSES, loader
from tests.eval.test_knn import METRICS, clusters
from tests.eval.test_store import stored
from tests.pool import on_ranks


def passed(ranks: Ranks) -> dict[str, Any]:
    model = build("small", CLASSES, seed=3)
    whole = extract(model, loader(ranks), ranks)
    few = extract(
        model, loader(ranks), ranks, InferenceOptions((5,))
    )  # two of three ranks get nothing
    return {
        "exact": [whole.labels.tolist(), whole.forget.tolist(), whole.index.tolist()],
        "few": few.index.tolist(),
        "close": torch.cat([whole.features, whole.logits], dim=1).tolist(),
    }


def unreadable(ranks: Ranks) -> str:
    read = loader(ranks)
    inner = read.images.read_many

    def refuse(indices: Any) -> Any:
        if 46 in indices:
            raise InputError("got image 46, which cannot be read")
        return inner(indices)

    read.images.read_many = refuse  # type: ignore[method-assign]
    try:
        extract(build("small", CLASSES), read, ranks)
    except InputError as error:
        return str(error)
    return "nothing was raised"


def neighbours(ranks: Ranks) -> list[Any]:
    found: list[Any] = []
    for metric in METRICS:
        x, labels = clusters(201)
        x, labels = torch.cat([x, x[:50]]), torch.cat([labels, labels[:50]])  # ties over ranks
        q, truth = clusters(30, seed=1)
        q, truth = torch.cat([q, x[:5]]), torch.cat([truth, labels[:5]])
        got = knn(x, labels, q, truth, (1, 100), metric, ranks=ranks)
        few = nearest(x[:2], q, 2, metric, ranks=ranks)  # less than one row a rank
        found.append([got.accuracy, got.index.tolist(), few.places.tolist()])
    return found


def kept(ranks: Ranks, folder: Path) -> dict[str, Any]:
    place = folder / str(ranks.world)
    first, again = stored(place, ranks), stored(place, ranks, seed=8)
    few = stored(place, ranks, indices=(5,))
    return {
        "same": torch.equal(first.logits, again.logits) and few.index.tolist() == [5],
        "close": first.logits.tolist(),
    }


def row(ranks: Ranks) -> dict[str, Any]:
    loaders = {"train": loader(ranks), "test": loader(ranks, 30), "domain/art": loader(ranks, 40)}
    sides = [
        sweep(Swept(str(seed), build("small", CLASSES, seed=seed)), loaders, ranks)
        for seed in (1, 2, 3)
    ]
    return measure(*sides, ranks=ranks)


def everything(ranks: Ranks, folder: Path) -> dict[str, Any]:
    return {
        "passed": passed(ranks),
        "unreadable": unreadable(ranks),
        "neighbours": neighbours(ranks),
        "kept": kept(ranks, folder),
        "row": row(ranks),
    }


Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("store")
    return {world: on_ranks(world, everything, folder) for world in (1, 2, 3)}


def test_every_rank_has_the_same(results: Results) -> None:
    for world in (2, 3):
        assert all(result == results[world][0] for result in results[world])


@pytest.mark.parametrize("world", [2, 3])
def test_a_pass_reads_each_sample_once(results: Results, world: int) -> None:
    one, many = results[1][0]["passed"], results[world][0]["passed"]
    assert many["exact"] == one["exact"]
    assert many["few"] == [5]
    # Batches are cut elsewhere, so products may be summed in another order.
    torch.testing.assert_close(torch.tensor(many["close"]), torch.tensor(one["close"]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_unreadable_image_stops_every_rank_with_its_message(
    results: Results, world: int
) -> None:
    assert {result["unreadable"] for result in results[world]} == {
        "got image 46, which cannot be read"
    }


@pytest.mark.parametrize("world", [2, 3])
def test_a_shared_database_gives_the_same_neighbours(results: Results, world: int) -> None:
    assert results[world][0]["neighbours"] == results[1][0]["neighbours"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_write_one_store(results: Results, world: int) -> None:
    assert results[world][0]["kept"]["same"]
    want = extract(build("small", CLASSES, seed=3), loader(Ranks()), Ranks()).logits
    torch.testing.assert_close(torch.tensor(results[world][0]["kept"]["close"]), want)


@pytest.mark.parametrize("world", [2, 3])
def test_one_row(results: Results, world: int) -> None:
    one, many = results[1][0]["row"], results[world][0]["row"]
    assert many["counts"] == one["counts"]
    assert many["knn_domains"] == one["knn_domains"]
    assert many["cka_retrained"] == pytest.approx(one["cka_retrained"], abs=1e-6)
    assert many["conditions"] == one["conditions"]
