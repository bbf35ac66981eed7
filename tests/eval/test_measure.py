"""One row of a model: every number from its own definition, on outputs made by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from letheon.engine.distributed import Ranks
from letheon.engine.model import build
from letheon.eval.cka import legacy_cka, linear_cka
from letheon.eval.features import Outputs
from letheon.eval.measure import Conditions, Passes, measure, sweep
from letheon.eval.splits import split
from letheon.loaders.errors import InputError
from tests.eval.test_features import CLASSES, loader
from tests.pool import on_ranks


def outputs(n: int, seed: int, labels_seed: int = 0) -> Outputs:
    labels = torch.from_numpy(np.random.default_rng(labels_seed).integers(0, 4, n))
    draw = np.random.default_rng(seed + 100)
    features = torch.from_numpy(draw.normal(size=(n, 12)) + labels[:, None].numpy()).float()
    logits = torch.from_numpy(draw.normal(size=(n, 4))).float()
    logits[torch.arange(n), labels] += 1
    return Outputs(features, logits, labels, labels == 1, torch.arange(n))


def passes(name: str, seed: int) -> Passes:
    sets = {"train": 80, "test": 60, "domain/art": 50, "domain/photo": 70}
    made = {key: outputs(n, seed * 10 + i, i) for i, (key, n) in enumerate(sets.items())}
    return Passes(name, made, f"digest of {name}")


def test_every_number_is_its_definition() -> None:
    model, original, retrained = passes("a", 1), passes("original", 2), passes("retrained", 3)
    row = measure(model, original, retrained)

    def share(side: Passes, key: str, part: bool) -> float:
        out = side.outputs[key]
        rows = (out.labels == 1).numpy() == part
        return float((out.logits.numpy().argmax(1) == out.labels.numpy())[rows].mean())

    names = {"FA": ("train", True), "RA": ("train", False), "TFA": ("test", True)}
    names["TRA"] = ("test", False)
    for name, (key, part) in names.items():
        assert row[name] == share(model, key, part)
    assert row["UA"] == 1 - row["FA"]
    gaps = [abs(share(model, *at) - share(retrained, *at)) for at in names.values()]
    assert row["gap"] == pytest.approx(np.mean(gaps))

    for domain in ("art", "photo"):
        out = model.outputs[f"domain/{domain}"]
        parts = split(len(out))
        oracle = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
        oracle.fit(out.features[parts.database].double(), out.labels[parts.database])
        want = oracle.score(out.features[parts.queries].double(), out.labels[parts.queries])
        assert row["knn_domains"][domain][5] == want
    assert row["knn"] == pytest.approx(np.mean([s[5] for s in row["knn_domains"].values()]))

    ours = model.outputs["test"]
    for label, other in (("original", original), ("retrained", retrained)):
        theirs = other.outputs["test"]
        for suffix, rows in (
            ("", slice(None)),
            ("_forget", ours.forget),
            ("_retain", ~ours.forget),
        ):
            want = linear_cka(ours.features[rows], theirs.features[rows])
            assert row[f"cka_{label}{suffix}"] == pytest.approx(want)
        assert row[f"cka_{label}_floor"] < row[f"cka_{label}"]
    assert row["why"] == {}
    assert row["conditions"]["digest"] == "digest of a"
    assert row["conditions"]["retrained"] == "digest of retrained"
    json.dumps(row, allow_nan=False)


def test_the_retrained_model_has_no_gap_to_itself() -> None:
    retrained = passes("retrained", 3)
    row = measure(retrained, None, retrained)
    assert row["gap"] == 0
    assert row["cka_retrained"] == pytest.approx(1)
    assert "cka_original" not in row


def test_what_is_not_defined_is_none_and_says_why() -> None:
    model, other = passes("a", 1), passes("original", 2)
    for side in (model, other):
        for key in ("train", "test"):
            side.outputs[key].forget[:] = False
    row = measure(model, other, other)
    assert row["FA"] is None and row["TFA"] is None and row["UA"] is None
    assert row["counts"]["FA"] == [0, 0]
    assert row["cka_original_forget"] is None
    assert "no samples" in row["why"]["FA"] and "0 images" in row["why"]["cka_original_forget"]
    assert not any(isinstance(v, float) and math.isnan(v) for v in row.values())
    assert row["gap"] is not None


def test_without_domains_there_is_no_knn() -> None:
    model = passes("a", 1)
    del model.outputs["domain/art"], model.outputs["domain/photo"]
    row = measure(model)
    assert row["knn"] is None and row["knn_domains"] == {} and row["gap"] is None


def test_compatibility_values_are_explicit() -> None:
    model, other = passes("a", 1), passes("original", 2)
    row = measure(model, other, None, Conditions(space="logits", split="legacy", cka="legacy"))
    ours, theirs = model.outputs["test"].features, other.outputs["test"].features
    assert row["cka_original"] == legacy_cka(ours, theirs)
    out = model.outputs["domain/art"]
    parts = split(len(out), "legacy")
    oracle = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
    oracle.fit(out.logits[parts.database].double(), out.labels[parts.database])
    want = oracle.score(out.logits[parts.queries].double(), out.labels[parts.queries])
    assert row["knn_domains"]["art"][5] == want
    assert row["conditions"]["space"] == "logits" and row["conditions"]["split"] == "legacy"


def test_models_measured_on_different_sets_are_refused() -> None:
    model, other = passes("a", 1), passes("original", 2)
    other.outputs["test"] = outputs(59, 5, 1)
    with pytest.raises(InputError, match=r"60 images.*59"):
        measure(model, other)


def test_nan_features_name_model_and_set() -> None:
    model = passes("unlearned", 1)
    model.outputs["domain/art"].features[0, 0] = float("nan")
    with pytest.raises(InputError, match="part of art"):
        measure(model)
    model = passes("unlearned", 1)
    model.outputs["test"].features[0, 0] = float("nan")
    with pytest.raises(InputError, match="pooled features of unlearned on the test set"):
        measure(model, passes("original", 2))


@pytest.mark.parametrize("bad", [{"ks": ()}, {"ks": (0,)}, {"temperature": 0.0}, {"cka": "rbf"}])
def test_conditions_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Conditions(**bad)  # type: ignore[arg-type]


def work(ranks: Ranks) -> dict[str, object]:
    loaders = {"train": loader(ranks), "test": loader(ranks, 30), "domain/art": loader(ranks, 40)}
    sides = [
        sweep(str(seed), build("small", CLASSES, seed=seed), loaders, ranks) for seed in (1, 2, 3)
    ]
    return measure(*sides)


def test_one_two_and_three_ranks_give_one_row() -> None:
    one = work(Ranks())
    for world in (2, 3):
        rows = on_ranks(world, work)
        assert all(row == rows[0] for row in rows)
        assert rows[0]["counts"] == one["counts"]
        assert rows[0]["knn_domains"] == one["knn_domains"]
        assert rows[0]["cka_retrained"] == pytest.approx(one["cka_retrained"], abs=1e-6)


def test_sets_that_every_metric_needs_must_be_given() -> None:
    with pytest.raises(InputError, match="expected train and test"):
        sweep("a", build("small", CLASSES), {"train": loader(Ranks())}, Ranks())
