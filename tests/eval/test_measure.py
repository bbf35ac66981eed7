"""One row of a model: every number from its own definition, on outputs made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.errors import InputError, RunFailed
from letheon.eval.case import Case, Peers, Subject
from letheon.eval.comparison import Comparison, Entry
from letheon.eval.inference.passes import Passes, Store, SweepOptions, Swept
from letheon.eval.metrics.cka import cka_band, legacy_cka, linear_cka
from letheon.eval.metrics.knn_splits import split
from letheon.eval.outputs import Outputs
from letheon.eval.quick_row import Conditions, measure
from letheon.eval.row_builder import build_row
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import Request
from tests.eval.sweeping import sweep
from tests.eval.test_features import CLASSES, loader


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
        assert row["knn_domains"][domain]["5"] == want
    assert row["knn"] == pytest.approx(np.mean([s["5"] for s in row["knn_domains"].values()]))

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
    assert set(row["why"]) == {"seconds", "earlier"}
    assert row["conditions"]["digest"] == "digest of a"
    assert row["conditions"]["retrained"] == "digest of retrained"
    json.dumps(row, allow_nan=False)


def test_the_retrained_model_has_no_gap_to_itself() -> None:
    retrained = passes("retrained", 3)
    row = measure(retrained, None, retrained)
    assert row["gap"] == 0
    assert row["cka_retrained"] == pytest.approx(1)
    assert row["cka_original"] is None and "no original" in row["why"]["cka_original"]


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


def test_domain_matrix_and_accuracy_by_class() -> None:
    model = passes("a", 1)
    case = Case(Subject(model), Peers(names=tuple("abcd")), Conditions(ks=(7, 1)))
    row = build_row(case, "full").as_dict()
    assert list(row["domain_matrix"]) == ["art", "photo"] == list(row["domain_matrix"]["art"])
    assert row["domain_matrix"]["photo"]["photo"] == row["knn_domains"]["photo"]["7"]
    art, photo = model.outputs["domain/art"], model.outputs["domain/photo"]
    kept, asking = split(len(art)).database, split(len(photo)).queries
    oracle = KNeighborsClassifier(7, metric="cosine", algorithm="brute")
    oracle.fit(art.features[kept].double(), art.labels[kept])
    want = oracle.score(photo.features[asking].double(), photo.labels[asking])
    assert row["domain_matrix"]["art"]["photo"] == want
    test = model.outputs["test"]
    for c in range(4):
        chosen = test.labels == c
        right = test.logits[chosen].argmax(1) == c
        assert row["accuracy_by_class"][c] == float(right.double().mean())


def test_layers_are_compared_where_both_have_taps() -> None:
    model, retrained = passes("a", 1), passes("retrained", 2)
    for side in (model, retrained):
        test = side.outputs["test"]
        test.taps.update({"layer1": test.features[:, :3], "dead": torch.zeros(60, 2)})
    made = build_row(Case(Subject(model), Peers(retrained=(Subject(retrained),))), "full")
    row, why = made.values, made.why
    ours, theirs = (side.outputs["test"].taps["layer1"] for side in (model, retrained))
    assert row["cka_by_layer"]["layer1"] == pytest.approx(linear_cka(ours, theirs))
    assert row["cka_by_layer"]["dead"] is None
    assert "layer dead of a" in why["cka_by_layer dead"]
    assert 0 < row["cka_floor_by_layer"]["layer1"] < 1


def test_band_is_over_all_pairs_of_retrained_models() -> None:
    models = [passes(str(seed), seed) for seed in (1, 2, 3)]
    tests = [model.outputs["test"].features for model in models]
    pairs = [linear_cka(tests[i], tests[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    band = cka_band(models)
    assert band["pairs"] == 3
    assert [band[key] for key in ("low", "mean", "high")] == pytest.approx(
        [min(pairs), np.mean(pairs), max(pairs)]  # type: ignore[type-var]
    )
    assert cka_band(models[:1])["mean"] is None


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
    assert row["knn_domains"]["art"]["5"] == want
    assert row["conditions"]["space"] == "logits" and row["conditions"]["split"] == "legacy"


def test_models_measured_on_different_sets_are_refused() -> None:
    model, other = passes("a", 1), passes("original", 2)
    other.outputs["test"] = outputs(59, 5, 1)
    with pytest.raises(InputError, match=r"60 images.*59"):
        measure(model, other)


def test_nan_features_name_model_and_set() -> None:
    model = passes("unlearned", 1)
    model.outputs["domain/art"].features[0, 0] = float("nan")
    with pytest.raises(RunFailed, match="part of art"):
        measure(model)
    model = passes("unlearned", 1)
    model.outputs["test"].features[0, 0] = float("nan")
    with pytest.raises(RunFailed, match="pooled features of unlearned on the test set"):
        measure(model, passes("original", 2))


@pytest.mark.parametrize("bad", [{"ks": ()}, {"ks": (0,)}, {"temperature": 0.0}])
def test_conditions_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Conditions(**bad)  # type: ignore[arg-type]


def test_stored_passes_give_the_same_row(tmp_path: Path) -> None:
    loaders = {"train": loader(Ranks()), "test": loader(Ranks(), 30)}
    model = build("small", CLASSES, seed=1)
    taps = ("net.conv1",)
    store = Store(tmp_path, {"train": ("digest", 47), "test": ("other", 30)})
    kept, other = SweepOptions(store=store), build("small", CLASSES, seed=2)
    fresh = measure(sweep(Swept("a", model, "w", taps), loaders, Ranks()))
    first = measure(sweep(Swept("a", model, "w", taps), loaders, Ranks(), kept))
    again = measure(sweep(Swept("a", other, "w", taps), loaders, Ranks(), kept))
    assert fresh == first == again


def test_sets_that_every_metric_needs_must_be_given() -> None:
    with pytest.raises(InputError, match="expected train and test"):
        sweep(Swept("a", build("small", CLASSES)), {"train": loader(Ranks())}, Ranks())


def test_training_images_are_not_printed_as_test() -> None:
    model, other = passes("a", 1), passes("r", 2)
    for each in (model, other):
        each.outputs["test"] = each.outputs["train"]
    peers = Peers(retrained=(Subject(other),), names=tuple("abcd"), nothing_held_out=True)
    row = build_row(Case(Subject(model), peers), "full")
    known = build_row(Case(Subject(model), replace(peers, nothing_held_out=False)), "full")
    assert known.values["TFA"] == known.values["FA"]  # what would be printed
    for key in ("TFA", "TRA", "accuracy_by_class", "completeness", "mia_auc", "rmia_auc",
                "svc_efficacy_confidence", "svc_efficacy_confidence_published"):  # fmt: skip
        assert row.values[key] is None and "nothing is held out" in row.why[key], key
    assert row.values["counts"]["TFA"] == [0, 0] and row.values["FA"] == known.values["FA"]


def test_what_flatters_a_comparison_is_told() -> None:
    images, request = loader(Ranks()).images, Request("class:2", (2,), None, "d")
    others = loader(Ranks(), 30).images
    net = build("small", CLASSES)
    entries = [
        Entry("original", "original", net, "w", seed=1),
        Entry("same", "retrained", net, "w", seed=1),
        Entry("own", "retrained", net, "w", seed=1, own_stream=True),
        Entry("other", "retrained", net, "w", seed=2),
    ]
    whole = Comparison(entries, Data(images, others, ()), {}, request)
    (line,) = whole.warnings
    assert line.startswith("same was retrained with the seed of original, 1")
    train_only = Comparison(entries[:1], Data(images, images, ()), {}, request)
    assert train_only.nothing_held_out and "nothing is held out" in train_only.warnings[0]
