"""k-NN against scikit-learn and against the definition in float64, with ties of both kinds."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.case import Case, Conditions, Subject
from letheon.eval.inference.passes import Passes
from letheon.eval.metrics.knn import domain_matrix, knn, knn_accuracy, knn_by_domain
from letheon.eval.metrics.knn_splits import split
from letheon.eval.outputs import Outputs
from letheon.eval.search import neighbors
from letheon.eval.search.neighbors import Proposer, nearest, nearest_sets
from letheon.eval.search.scores import Metric

PROPOSERS: list[Proposer] = ["torch", "torch-bf16", "torch-fp64"]
if importlib.util.find_spec("faiss"):
    PROPOSERS.append("faiss")
METRICS: list[Metric] = ["cosine", "l2"]


def clusters(n: int, d: int = 24, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    labels = draw.integers(0, classes, n)
    rows = centres[labels] + 1.5 * draw.normal(size=(n, d)) + 0.5
    return torch.from_numpy(rows).float(), torch.from_numpy(labels)


def by_definition(database: Tensor, queries: Tensor, k: int, metric: Metric) -> np.ndarray:
    """Positions sorted by (distance, position), every distance in float64."""
    x, q = database.double().numpy(), queries.double().numpy()
    if metric == "cosine":
        x, q = (rows / np.maximum(np.linalg.norm(rows, axis=1)[:, None], 1e-300) for rows in (x, q))
        distance = -(q @ x.T)
    else:
        distance = ((q[:, None] - x[None]) ** 2).sum(axis=2)
    return np.argsort(distance.round(9), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", PROPOSERS)
def test_predictions_are_sklearns_for_every_k(backend: Proposer, metric: Metric) -> None:
    x, labels = clusters(700)
    q, truth = clusters(150, seed=1)
    ks = (1, 2, 5, 10, 20, 200)
    found = knn(x, labels, q, truth, ks, metric, backend=backend)
    for k in ks:
        oracle = KNeighborsClassifier(
            k, metric="cosine" if metric == "cosine" else "euclidean", algorithm="brute"
        ).fit(x.double().numpy(), labels.numpy())
        assert found.predictions[k].tolist() == oracle.predict(q.double().numpy()).tolist()
        assert found.accuracy[k] == oracle.score(q.double().numpy(), truth.numpy())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", PROPOSERS)
def test_equal_distances_go_to_the_lower_position(backend: Proposer, metric: Metric) -> None:
    base, _ = clusters(60, d=8)
    base = base.round()  # small whole numbers: many exactly equal distances
    x = base.repeat(5, 1)[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    q = torch.cat([base[:20], clusters(20, d=8, seed=3)[0].round()])
    got = nearest(x, q, 12, metric, backend)
    assert np.array_equal(got.places.numpy(), by_definition(x, q, 12, metric))


@pytest.mark.parametrize("backend", PROPOSERS)
def test_a_collapsed_representation_has_an_answer(backend: Proposer) -> None:
    x, labels = torch.ones(500, 16), torch.arange(500) % 3
    for rows in (x, torch.zeros(500, 16)):
        assert nearest(rows, rows[:4], 7, backend=backend).places[0].tolist() == list(range(7))
        sets, _ = nearest_sets(rows, rows[:4], (3, 7), backend=backend)
        assert sorted(sets[0, :3].tolist()) == [0, 1, 2] and sorted(sets[0].tolist()) == [*range(7)]
        found = knn(rows, labels, rows[:4], labels[:4], (3, 7), backend=backend)
        assert found.predictions[3].tolist() == found.predictions[7].tolist() == [0] * 4


@pytest.mark.parametrize("metric", METRICS)
def test_sets_are_those_of_the_exact_order(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random rows, many exact ties across places 3 and 20, and rows that float32 confuses."""
    noise, _ = clusters(400, d=16)
    whole = clusters(60, d=4)[0].round().repeat(6, 1)
    confused = noise[:1].double() + 1e-7 * clusters(300, d=16, seed=4)[0].double()
    for rows in (noise, whole, confused, torch.cat([noise.double()[:100], confused])):
        queries = rows[::9] + (0 if rows is whole else 0.01)
        for ks in ((1,), (3, 20), (1, 2, 3, 4, 150), (len(rows),)):
            exact = nearest(rows, queries, ks[-1], metric, "torch-fp64").places
            for tile in ((512, 32768), (7, 50)):
                monkeypatch.setattr(neighbors, "_TILE", {"cpu": tile})
                sets, recall = nearest_sets(rows, queries, ks, metric)
                assert recall == 1 and sets.shape == exact.shape
                for k in ks:
                    assert torch.equal(*(each[:, :k].sort(dim=1).values for each in (sets, exact)))


def test_equal_votes_go_to_the_lower_class() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3]])
    labels = torch.tensor([3, 1, 1, 3])
    found = knn(x, labels, x[:1], torch.tensor([1]), (1, 2, 4))
    assert {k: int(said) for k, said in found.predictions.items()} == {1: 3, 2: 1, 4: 1}


@pytest.mark.parametrize("metric", METRICS)
def test_tiles_do_not_matter(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = clusters(333)
    q, _ = clusters(50, seed=1)
    whole = nearest(x, q, 9, metric)
    for tile in ((7, 20), (50, 300)):
        monkeypatch.setattr(neighbors, "_TILE", {"cpu": tile})
        for backend in PROPOSERS:
            tiled = nearest(x, q, 9, metric, backend)
            assert torch.equal(tiled.places, whole.places)
            torch.testing.assert_close(tiled.similarity, whole.similarity, rtol=0, atol=1e-7)


def test_unproven_candidates_are_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances that float32 cannot tell apart, far more of them than there are candidates."""
    draw = np.random.default_rng(5)
    base = draw.normal(size=64)
    x = torch.from_numpy(base + 1e-7 * draw.normal(size=(2000, 64)))
    q = x[:10] + 1e-8
    want = by_definition_fine(x, q, 5)
    assert np.array_equal(nearest(x, q, 5, "l2").places.numpy(), want)


def by_definition_fine(x: Tensor, q: Tensor, k: int) -> np.ndarray:
    distance = ((q.numpy()[:, None] - x.numpy()[None]) ** 2).sum(axis=2)
    return np.argsort(distance, axis=1, kind="stable")[:, :k]


def test_temperature_votes_by_definition() -> None:
    x, labels = clusters(200)
    q, truth = clusters(40, seed=1)
    found = knn(x, labels, q, truth, (5, 50), weights="temperature", temperature=0.1)
    unit = [rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (x, q)]
    cosine = unit[1] @ unit[0].T
    for k in (5, 50):
        for row in range(40):
            near = by_definition(x, q[row : row + 1], k, "cosine")[0]
            sums = np.zeros(7)
            for place in near:
                sums[labels[place]] += np.exp(float(cosine[row, place]) / 0.1)
            assert int(found.predictions[k][row]) == sums.argmax()


def test_l2_temperature_equals_cosine_on_unit_vectors() -> None:
    x, labels = clusters(200)
    q, truth = clusters(40, seed=1)
    x, q = (torch.nn.functional.normalize(rows.double()) for rows in (x, q))
    one = knn(x, labels, q, truth, (30,), "cosine", weights="temperature")
    two = knn(x, labels, q, truth, (30,), "l2", weights="temperature")
    assert torch.equal(one.predictions[30], two.predictions[30])


def test_values_that_are_not_numbers_name_their_set() -> None:
    x, labels = clusters(50)
    q, truth = clusters(5, seed=1)
    q[2, 3] = float("nan")
    with pytest.raises(RunFailed, match="1 of 5 rows of the query part of art"):
        knn(x, labels, q, truth, names=("a", "the query part of art"))
    with pytest.raises(InputError, match="k = 51 for the database of 50"):
        knn(x, labels, q[:2], truth[:2], ks=(51,))
    with pytest.raises(InputError, match="temperature 0"):
        knn(x, labels, q[:2], truth[:2], weights="temperature", temperature=0)


def domain(n: int, seed: int) -> Outputs:
    x, labels = clusters(n, seed=seed)
    return Outputs(x, -x[:, :7], labels, torch.zeros(n, dtype=torch.bool), torch.arange(n))


def test_domain_matrix_uses_each_domains_own_parts() -> None:
    domains = {"art": domain(90, 1), "photo": domain(60, 2)}
    splits = {name: split(len(outputs)) for name, outputs in domains.items()}
    got = domain_matrix(case_of(domains))
    assert list(got) == list(domains)
    for a, b in ((a, b) for a in domains for b in domains):
        source, target = domains[a], domains[b]
        stored, asking = splits[a].database, splits[b].queries
        oracle = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
        oracle.fit(source.features[stored].double().numpy(), source.labels[stored].numpy())
        want = oracle.score(target.features[asking].double(), target.labels[asking].numpy())
        assert got[a][b] == want


def case_of(domains: dict[str, Outputs], **conditions: Any) -> Case:
    passes = Passes("a", {f"domain/{name}": outputs for name, outputs in domains.items()})
    return Case(Subject(passes), conditions=Conditions(**conditions))


def test_only_the_logits_space_reads_the_head() -> None:
    domains = {"art": domain(90, 1)}
    edited = {"art": Outputs(domains["art"].features, torch.randn(90, 7), *_rest(domains["art"]))}

    def shares(of: dict[str, Outputs], space: str) -> Any:
        return knn_by_domain(case_of(of, space=space, ks=(1, 3, 5, 7)))

    assert shares(domains, "pooled") == shares(edited, "pooled")
    assert shares(domains, "logits") != shares(edited, "logits")


def _rest(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    return outputs.labels, outputs.forget, outputs.index


@pytest.mark.skipif("faiss" not in PROPOSERS, reason="faiss is not installed")
def test_inverted_lists_say_what_they_find() -> None:
    x, labels = clusters(4000, d=6)
    q, truth = clusters(100, d=6, seed=1)
    found = knn(x, labels, q, truth, (10,), backend="faiss-ivf")
    want = by_definition(x, q, 10, "cosine")
    near = nearest(x, q, 10, "cosine", "faiss-ivf")
    true = [len(set(a) & set(b)) / 10 for a, b in zip(near.places.tolist(), want, strict=True)]
    assert found.recall == near.recall == pytest.approx(np.mean(true))
    assert 0.3 < found.recall < 1
    many = nearest(x[:200], q, 150, "cosine", "faiss-ivf")  # more than the lists read hold
    assert many.places.min() >= 0 and many.places.max() < 200
    assert knn(x, labels, q, truth, (10,), backend="faiss").recall == 1


@pytest.mark.skipif("faiss" not in PROPOSERS, reason="faiss is not installed")
def test_a_graph_on_a_gpu_is_refused_without_one_and_says_what_it_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import faiss

    x, q = clusters(300, d=6)[0], clusters(20, d=6, seed=1)[0]
    if not getattr(faiss, "get_num_gpus", int)():
        with pytest.raises(InputError, match="faiss-cagra; expected a GPU"):
            nearest(x, q, 5, "cosine", "faiss-cagra")

    class Graph:  # a stand-in with the interface of faiss.GpuIndexCagra: every other row is found
        def __init__(self, resources: object, width: int, metric: int, config: object) -> None:
            assert metric == faiss.METRIC_INNER_PRODUCT
            self.flat = faiss.IndexFlatIP(width)

        def train(self, rows: np.ndarray) -> None:
            self.flat.add(np.ascontiguousarray(rows[::2]))

        def search(self, rows: np.ndarray, m: int, params: Any) -> tuple[np.ndarray, np.ndarray]:
            assert params.itopk_size >= m
            values, places = self.flat.search(rows, m)
            return values, 2 * places

    for name in ("StandardGpuResources", "GpuIndexCagraConfig", "SearchParametersCagra"):
        monkeypatch.setattr(faiss, name, SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexCagra", Graph, raising=False)
    found = nearest(x, q, 5, "cosine", "faiss-cagra")
    even = nearest(x[::2], q, 5, "cosine", "torch-fp64")
    assert torch.equal(found.places, 2 * even.places)
    want = by_definition(x, q, 5, "cosine")
    true = [len(set(a) & set(b)) / 5 for a, b in zip(found.places.tolist(), want, strict=True)]
    assert 0 < found.recall < 1 and found.recall == pytest.approx(np.mean(true))


def test_classes_of_one_image_have_a_reason_and_no_accuracy() -> None:
    art, photo = domain(90, 1), domain(60, 2)
    art = replace(art, labels=torch.arange(90))
    case = case_of({"art": art})
    with pytest.raises(NotMeasurable, match=r"no query of art .* several images"):
        knn_accuracy(case)
    both = case_of({"art": art, "photo": photo})
    assert knn_by_domain(both)["art"] == {"5": None}
    assert knn_accuracy(both) == knn_accuracy(case_of({"photo": photo})) > 0
