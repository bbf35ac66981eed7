"""Everything that runs on several ranks: 1, 2 and 3 of them give one answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from letheon.engine.distributed import Ranks, gather_rows, wait_for_ranks
from letheon.engine.models.classifier import build
from letheon.errors import InputError
from letheon.eval.case import Case, Conditions, Peers, Subject
from letheon.eval.inference.extract import InferenceOptions, extract
from letheon.eval.inference.passes import Passes, Swept
from letheon.eval.membership.over_seeds import margins
from letheon.eval.metrics.knn import knn
from letheon.eval.outputs import Outputs
from letheon.eval.quick_row import measure
from letheon.eval.row_builder import build_row
from letheon.eval.search.neighbors import nearest
from letheon.loaders.order import share
from tests.eval.sweeping import refuse_image, sweep
from tests.eval.test_audit import NAMES, flat, outputs, subject
from tests.eval.test_features import CLASSES, loader
from tests.eval.test_knn import METRICS, clusters
from tests.eval.test_store import stored
from tests.pool import on_ranks


def passed(ranks: Ranks) -> dict[str, Any]:
    model = build("small", CLASSES, seed=3)
    own = extract(model, loader(ranks), ranks)
    few = extract(
        model, loader(ranks), ranks, InferenceOptions((5,))
    )  # two of three ranks get nothing
    assert few.features.shape[1] == own.features.shape[1]
    assert len(own) <= -(-47 // ranks.world)
    labels, forget, index = (own.gather(each) for each in (own.labels, own.forget, own.index))
    return {
        "exact": [labels.tolist(), forget.tolist(), index.tolist()],
        "few": few.gather(few.index).tolist(),
        "close": own.gather(torch.cat([own.features, own.logits], dim=1)).tolist(),
    }


def unreadable(ranks: Ranks) -> str:
    read = loader(ranks)
    refuse_image(read, 46)
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
        rows, asked, two = (share(len(t), ranks.rank, ranks.world) for t in (x, q, x[:2]))
        got = knn(x[rows], labels[rows], q[asked], truth[asked], (1, 100), metric, ranks=ranks)
        near = nearest(x[rows], q[asked], 100, metric, ranks=ranks)
        few = nearest(x[:2][two], q[asked], 2, metric, ranks=ranks)  # less than one row a rank
        each = (*got.predictions.values(), near.places, few.places)
        found.append([got.accuracy, *(gather_rows(one, ranks).tolist() for one in each)])
    return found


def kept(ranks: Ranks, folder: Path) -> dict[str, Any]:
    place = folder / str(ranks.world)
    first, again = stored(place, ranks), stored(place, ranks, seed=8)
    few = stored(place, ranks, indices=(5,))
    return {
        "same": torch.equal(first.logits, again.logits) and few.gather(few.index).tolist() == [5],
        "close": first.gather(first.logits).tolist(),
    }


def row(ranks: Ranks) -> dict[str, Any]:
    loaders = {"train": loader(ranks), "test": loader(ranks, 30), "domain/art": loader(ranks, 40)}
    sides = [
        sweep(Swept(str(seed), build("small", CLASSES, seed=seed)), loaders, ranks)
        for seed in (1, 2, 3)
    ]
    return measure(*sides, ranks=ranks)


def audited(ranks: Ranks) -> dict[str, Any]:
    """A full row of outputs that are shared out, beside peers."""

    def part(passes: Passes) -> Passes:
        own = {}
        for key, whole in passes.outputs.items():
            rows = torch.arange(len(whole))[share(len(whole), ranks.rank, ranks.world)]
            own[key] = replace(whole.where(rows), ranks=ranks)
        return replace(passes, outputs=own)

    def sharded(name: str, seed: int) -> Subject:
        made = subject(name, seed)
        made.passes.outputs["domain/art"] = outputs(50, seed * 10 + 3, 4)
        made.passes.outputs["domain/photo"] = outputs(70, seed * 10 + 4, 5)
        return replace(made, passes=part(made.passes))

    retrained = tuple(sharded(f"r{seed}", seed) for seed in (2, 3))
    of = Peers(sharded("original", 1), retrained, sharded("random", 4).passes, (1,), NAMES)
    legacy = Conditions(ks=(5, 1), cka="legacy", weights="temperature", metric="l2")
    model = sharded("a", 5)
    row = build_row(Case(model, of, ranks=ranks), "full").as_dict()
    other = build_row(Case(model, of, legacy, ranks), "quick").as_dict()
    return {"row": row, "legacy": other, "margins": margins(model.passes).tolist()}


def planted(ranks: Ranks) -> dict[str, Any]:
    """Canaries and strata of outputs that are shared out."""
    generator = torch.Generator().manual_seed(0)
    labels, features = torch.arange(60) % 5, torch.zeros(60, 2)
    logits = torch.randn(60, 5, generator=generator)
    known = {number: int((labels[number] + 1) % 5) for number in range(0, 48, 3)}
    logits[:, 0] += 1
    rows = torch.arange(60)[share(60, ranks.rank, ranks.world)]
    whole = Outputs(features, logits, labels, torch.arange(60) < 40, torch.arange(60))
    own = replace(whole.where(rows), ranks=ranks)
    of = Peers(names=tuple("abcde"), canaries=known, groups=("even", "odd") * 30)
    case = Case(Subject(Passes("a", {"train": own, "test": own})), of, ranks=ranks)
    values = build_row(case).values
    return {key: values[key] for key in values if key.startswith("canar") or key == "strata"}


def apart(ranks: Ranks) -> list[float]:
    """Ranks that take differently long meet without a collective."""
    sums = []
    for turn in range(3):
        work = sum(range(10_000 * (1 + ranks.rank)))  # the first rank is done first
        wait_for_ranks(ranks)
        sums.append(float(gather_rows(torch.tensor([turn + 0 * work]), ranks).float().mean()))
    return sums


def everything(ranks: Ranks, folder: Path) -> dict[str, Any]:
    return {
        "passed": passed(ranks),
        "unreadable": unreadable(ranks),
        "neighbours": neighbours(ranks),
        "kept": kept(ranks, folder),
        "row": row(ranks),
        "audited": audited(ranks),
        "planted": planted(ranks),
        "apart": apart(ranks),
    }


class Results(dict[int, list[dict[str, Any]]]):
    """What every rank of so many has, once it is asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, world: int) -> list[dict[str, Any]]:
        self[world] = on_ranks(world, everything, self.folder)
        return self[world]


THREE = pytest.param(3, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("world", [2, THREE])
def test_every_rank_has_the_same(results: Results, world: int) -> None:
    assert all(result == results[world][0] for result in results[world])


@pytest.mark.parametrize("world", [2, THREE])
def test_a_pass_reads_each_sample_once(results: Results, world: int) -> None:
    one, many = results[1][0]["passed"], results[world][0]["passed"]
    assert many["exact"] == one["exact"]
    assert many["few"] == [5]
    # Batches are cut elsewhere, so products may be summed in another order.
    torch.testing.assert_close(torch.tensor(many["close"]), torch.tensor(one["close"]))


@pytest.mark.parametrize("world", [1, 2, THREE])
def test_an_unreadable_image_stops_every_rank_with_its_message(
    results: Results, world: int
) -> None:
    assert {result["unreadable"] for result in results[world]} == {
        "got image 46, which cannot be read"
    }


@pytest.mark.parametrize("world", [2, THREE])
def test_a_shared_database_gives_the_same_neighbours(results: Results, world: int) -> None:
    assert results[world][0]["neighbours"] == results[1][0]["neighbours"]


@pytest.mark.parametrize("world", [1, 2, THREE])
def test_ranks_write_one_store(results: Results, world: int) -> None:
    assert results[world][0]["kept"]["same"]
    want = extract(build("small", CLASSES, seed=3), loader(Ranks()), Ranks()).logits
    torch.testing.assert_close(torch.tensor(results[world][0]["kept"]["close"]), want)


@pytest.mark.parametrize("world", [2, THREE])
def test_one_row(results: Results, world: int) -> None:
    one, many = results[1][0]["row"], results[world][0]["row"]
    assert many["counts"] == one["counts"]
    assert many["knn_domains"] == one["knn_domains"]
    assert many["cka_retrained"] == pytest.approx(one["cka_retrained"], abs=1e-6)
    assert many["conditions"] == one["conditions"]


@pytest.mark.parametrize("world", [2, THREE])
def test_every_metric_of_shared_out_samples_is_that_of_one_rank(
    results: Results, world: int
) -> None:
    one, many = (flat(results[n][0]["audited"]) for n in (1, world))
    assert set(many) == set(one) and len(one) > 200
    for key, value in one.items():
        if "/embedding/points" in key:  # a picture: t-SNE magnifies rounding
            continue
        near = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
        assert many[key] == near, key


@pytest.mark.parametrize("world", [1, 2, THREE])
def test_canaries_are_found_wherever_they_lie(results: Results, world: int) -> None:
    one, many = (flat(results[n][-1]["planted"]) for n in (1, world))
    assert many == pytest.approx(one)
    assert many["/canaries/forget"] == 14 and many["/canaries/retain"] == 2
    assert {f"/canary_{name}" for name in ("recovery", "chance", "rank", "p")} < many.keys()
    assert many["/strata/group/even/images"] == 20
    # 8 images of each label, of which the canaries show the next class; 14 of 40 are canaries.
    sizes = [many[f"/strata/class/{name}/images"] for name in "abcde"]
    labels = [number % 5 for number in range(40)]
    shown = [(k + 1) % 5 if number % 3 == 0 else k for number, k in enumerate(labels)]
    assert sizes == [shown.count(k) for k in range(5)]
