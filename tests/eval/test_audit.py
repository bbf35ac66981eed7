"""A full row: every key from its own definition, and a reason for each that has no ingredients."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import roc_auc_score

from letheon.engine.models.classifier import build
from letheon.errors import InputError
from letheon.eval.case import Case, Peers, Subject
from letheon.eval.checks import check_finite
from letheon.eval.inference.passes import Passes
from letheon.eval.inference.sampling import sample_rows
from letheon.eval.membership.many_models import klom, u_lira
from letheon.eval.membership.over_seeds import Runs, SeveralRuns, margins
from letheon.eval.membership.signals import margin
from letheon.eval.metrics.registry import metrics
from letheon.eval.outputs import Outputs
from letheon.eval.probes.information import BALANCED, idi, information
from letheon.eval.probes.relearn import RelearnCurve
from letheon.eval.probes.relearn_evaluator import HEAD, WHOLE, Lesson, Relearning, curves
from letheon.eval.row_builder import Row, add_stage, build_row
from tests.eval.sweeping import still

CLASSES = 4
NAMES = ("ant", "bee", "cat", "dog")


def outputs(
    n: int, seed: int, labels_seed: int, taps: bool = False, strength: float = 0.5
) -> Outputs:
    labels = torch.from_numpy(np.random.default_rng(labels_seed).integers(0, CLASSES, n))
    draw = np.random.default_rng(seed + 100)
    features = torch.from_numpy(draw.normal(size=(n, 64)))
    features[:, :CLASSES] += 4 * strength * torch.eye(CLASSES)[labels]
    features = features.float()
    logits = torch.from_numpy(draw.normal(size=(n, CLASSES))).float()
    logits[torch.arange(n), labels] += 1
    pooled = {"net.conv1": features[:, :5] * 0.5} if taps else {}
    return Outputs(features, logits, labels, labels == 1, torch.arange(n), pooled)


def subject(name: str, seed: int, classes_of: int = CLASSES) -> Subject:
    sets = {"train": outputs(160, seed * 10, 1), "test": outputs(90, seed * 10 + 1, 2, taps=True)}
    strength = 1.0 if name == "original" else 0.2
    sets[BALANCED] = outputs(80, seed * 10 + 2, 3, taps=True, strength=strength)
    return Subject(Passes(name, sets, name), partial(build, "small", classes_of, seed))


def peers(**changes: object) -> Peers:
    whole = Peers(
        subject("original", 1), (subject("r2", 2), subject("r3", 3)), subject("random", 4).passes,
        (1,), NAMES,
    )  # fmt: skip
    return replace(whole, **changes)  # type: ignore[arg-type]


def full(model: Subject, of: Peers) -> dict[str, Any]:
    return build_row(Case(model, of), "full").as_dict()


def test_every_key_is_its_definition() -> None:
    model, others = subject("a", 5), peers()
    row = full(model, others)
    assert set(row["why"]) == {"seconds", "knn", "domain_matrix", "earlier"}
    known = {key for metric in metrics().values() for key in metric.keys}
    shares = {key for key, value in row.items() if isinstance(value, float)}
    assert shares <= known and len(shares) >= 22
    train, test = model.passes.outputs["train"], model.passes.outputs["test"]

    def softmax(side: Outputs, rows: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
        z = side.logits[rows].double().numpy()
        e = np.exp(z - z.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))

    mine = softmax(train, train.forget)
    theirs = [softmax(o.passes.outputs["train"], train.forget) for o in others.retrained]
    js = [jensenshannon(mine, p, axis=1) ** 2 for p in theirs]  # scipy gives the root
    assert row["js"] == pytest.approx(np.mean(js))
    assert row["activation_distance"] == pytest.approx(
        np.mean([np.linalg.norm(mine - p, axis=1) for p in theirs])
    )
    named = [o.passes.outputs["test"].logits.argmax(1) for o in others.retrained]
    agreeing = np.mean([(test.logits.argmax(1) == n).double().mean() for n in named])
    assert row["completeness"] == pytest.approx(agreeing)
    assert others.untrained is not None
    untrained = softmax(others.untrained.outputs["train"], train.forget)
    assert row["zrf"] == pytest.approx(1 - (jensenshannon(mine, untrained, axis=1) ** 2).mean())

    p_in, p_out = mine[:, 1], softmax(test, test.labels == 1)[:, 1]
    truth = np.r_[np.ones(len(p_in)), np.zeros(len(p_out))]
    assert row["mia_auc"] == pytest.approx(roc_auc_score(truth, np.r_[p_in, p_out]))
    assert row["mia_within_class_auc"] == pytest.approx(row["mia_auc"])  # one class

    def bits(of: Subject) -> dict[str, float]:
        side = of.passes.outputs[BALANCED]
        layers = {**side.taps, "features": side.features}
        return {name: information(rows, side.forget) for name, rows in layers.items()}

    first, second = map(bits, others.retrained)
    mean = {layer: (first[layer] + second[layer]) / 2 for layer in first}
    assert others.original is not None
    assert row["idi"] == pytest.approx(idi(bits(model), mean, bits(others.original)).value)

    def flat(of: Subject) -> torch.Tensor:
        assert of.network is not None
        return torch.cat([p.detach().double().flatten() for p in of.network().parameters()])

    moved = [float((flat(model) - flat(o)).norm() / flat(o).norm()) for o in others.retrained]
    assert row["weight_distance_retrained"] == pytest.approx(np.mean(moved))
    assert row["head_confusion"]["rows"] == ["bee"]
    assert len(row["embedding"]["points"]) == len(row["embedding"]["labels"])


def test_the_original_measured_again_has_index_one_and_distance_zero() -> None:
    others = peers()
    assert others.original is not None
    again = Subject(others.original.passes, others.original.network)
    row = full(again, others)
    assert row["idi"] == pytest.approx(1) and row["weight_distance_original"] == 0


def test_what_is_missing_has_its_reason() -> None:
    model = subject("a", 5)
    row = full(model, peers(original=None, retrained=(), untrained=None, forgotten=()))
    reasons = {
        "rmia_auc": "no retrained model", "js": "no retrained model", "idi": "no original",
        "zrf": "no untrained network", "probe_forgotten": "whole classes",
        "weight_distance_original": "no original", "embedding": "whole classes",
    }  # fmt: skip
    for key, reason in reasons.items():
        assert row[key] is None and reason in row["why"][key]
    assert row["svc_efficacy_confidence"] is not None
    one = subject("r", 6)
    alone = full(one, peers(retrained=(one,)))
    assert alone["js"] is None and "besides this one" in alone["why"]["js"]
    other_head = full(model, peers(retrained=(subject("wide", 3, 7),)))
    assert "fc.weight" in other_head["why"]["weight_distance_retrained"]


def test_membership_of_samples_from_every_class() -> None:
    model = subject("a", 5)
    others = peers(forgotten=())
    assert others.original is not None and others.untrained is not None
    models = (model, others.original, *others.retrained)
    for passes in (*(each.passes for each in models), others.untrained):
        train = passes.outputs["train"]
        mixed = replace(train, forget=torch.arange(len(train)) % 3 == 0)
        passes.outputs["train"] = mixed
    row = full(model, others)
    assert row["rmia_auc"] is not None and row["mia_auc"] is not None


def test_canaries_have_no_match_among_held_out_images() -> None:
    """Their wrong labels would bring held-out images of every class among the non-members."""
    model, others = subject("a", 5), peers()
    assert others.original is not None and others.untrained is not None
    models = [each.passes for each in (model, others.original, *others.retrained)]
    forgotten = model.passes.outputs["train"].index[model.passes.outputs["train"].forget]
    planted = forgotten[:6]
    for passes in (*models, others.untrained):
        train = passes.outputs["train"]
        labels = train.labels.clone()
        labels[planted] = torch.tensor([0, 2, 3, 0, 2, 3])
        passes.outputs["train"] = replace(train, labels=labels)
    row = full(model, replace(others, canaries=dict.fromkeys(planted.tolist(), 1)))
    train, test = (model.passes.outputs[key] for key in ("train", "test"))
    inside = train.forget & (train.labels == 1)
    assert int(inside.sum()) == len(forgotten) - 6
    scores = [margin(side.logits, side.labels) for side in (train, test)]
    members, held = scores[0][inside], scores[1][test.labels == 1]
    truth = np.r_[np.ones(len(members)), np.zeros(len(held))]
    want = roc_auc_score(truth, torch.cat([members, held]).numpy())
    assert row["mia_auc"] == pytest.approx(want) == row["mia_within_class_auc"]


@pytest.mark.parametrize(
    ("where", "named"),
    [("tap", "layer net.conv1"), ("features", "the pooled features"), ("logits", "the logits")],
)
def test_values_that_are_not_numbers_name_their_layer(where: str, named: str) -> None:
    passes = subject("mine", 1).passes
    side = passes.outputs["test"]
    rows = side.taps["net.conv1"] if where == "tap" else getattr(side, where)
    rows[3, 0] = float("inf") if where == "tap" else float("nan")
    with pytest.raises(InputError, match=f"1 of 90 images in {named} of mine on the test set"):
        check_finite(passes)


def test_methods_of_several_runs() -> None:
    passes = [subject(str(seed), seed).passes for seed in range(1, 8)]
    ours, theirs = [[margins(p) for p in part] for part in (passes[:3], passes[3:])]
    retrained = Runs(theirs, {"RA": 0.8, "TRA": 0.5})
    row = Row("a")
    add_stage(row, SeveralRuns(Runs(ours, {"RA": 0.6, "TRA": 0.4}), retrained))
    assert row.values["u_lira"] == u_lira(torch.stack(ours), torch.stack(theirs)).accuracy
    spread = klom(torch.stack(ours), torch.stack(theirs))
    assert row.values["klom_p95"] == pytest.approx(np.quantile(spread, 0.95))
    quality = row.values["challenge_quality"]
    assert row.values["challenge_score"] == pytest.approx(quality * 0.75 * 0.8)
    few = Row("few")
    add_stage(few, SeveralRuns(Runs(ours[:2], {}), retrained))
    assert few.values["u_lira"] is None and "needs 3 of each" in few.why["u_lira"]


def test_sampled_rows_are_the_same_for_every_model_and_no_more_than_wanted() -> None:
    rows = torch.arange(50) % 2 == 0
    chosen = sample_rows(rows, 7)
    assert len(chosen) == 7 and bool(rows[chosen].all()) and bool((chosen.diff() > 0).all())
    assert torch.equal(chosen, sample_rows(rows, 7)) and torch.equal(
        sample_rows(rows), rows.nonzero()[:, 0]
    )


def test_relearning_leaves_the_model_and_its_head_only_form_leaves_the_encoder() -> None:
    model = build("small", CLASSES, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 2
    images = torch.randn(24, 3, 16, 16, generator=generator) + labels[:, None, None, None]
    lesson = Lesson(images, labels, images, labels, steps=30)
    found = curves(model, lesson, torch.device("cpu"), still)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    for curve in found.values():
        assert curve.steps[0] == 0 and curve.steps[-1] == 30
        assert curve.accuracy[-1] > 0.9 and curve.accuracy[0] < 0.9
    model.eval()
    start = float((model(images).logits.argmax(1) == labels).double().mean())
    assert found[WHOLE].accuracy[0] == found[HEAD].accuracy[0] == pytest.approx(start)


def test_relearn_steps_are_counted_to_the_originals_accuracy() -> None:
    def both(*accuracy: float) -> dict[str, RelearnCurve]:
        curve = RelearnCurve([0, 5, 10], list(accuracy), None)
        return {WHOLE: curve, HEAD: curve}

    def steps(*of: Any) -> Row:
        row = Row("a")
        add_stage(row, Relearning(*of))
        return row

    row = steps(both(0.0, 0.5, 0.9), both(0.9, 0.9, 0.9), both(0.0, 0.88, 0.9))
    assert (row.values["relearn_steps"], row.values["anamnesis_index"]) == (10, 2.0)
    nothing = steps(both(0.0, 0.5, 0.6), both(0.05, 0.9, 0.9), None)
    assert "nothing to relearn" in nothing.why["relearn_steps"]
    late = steps(both(0.0, 0.5, 0.6), both(0.9, 0.9, 0.9), None)
    assert late.values["relearn_steps"] is None and "10 steps" in late.why["relearn_steps"]
    assert steps(both(0.0, 0.5, 0.6), None, None).values["relearn_steps"] is None


def test_values_are_those_of_the_first_edition() -> None:
    """A committed row, measured before the metrics had a registry."""

    def whole(name: str, seed: int) -> Subject:
        made = subject(name, seed)
        made.passes.outputs["domain/art"] = outputs(50, seed * 10 + 3, 4)
        made.passes.outputs["domain/photo"] = outputs(70, seed * 10 + 4, 5)
        return made

    of = Peers(
        whole("original", 1), (whole("r2", 2), whole("r3", 3)), whole("random", 4).passes,
        (1,), NAMES,
    )  # fmt: skip
    row = build_row(Case(whole("a", 5), of), "full")
    margin = [margins(whole(str(seed), seed).passes) for seed in range(1, 8)]
    ours = Runs(margin[:3], {"RA": 0.6, "TRA": 0.4})
    add_stage(row, SeveralRuns(ours, Runs(margin[3:], {"RA": 0.8, "TRA": 0.5})))
    file = Path(__file__).parents[1] / "fixtures" / "row-of-first-edition.json"
    want = json.loads(file.read_text(encoding="utf-8"))
    assert want.pop("why") == {} and len(want) > 50
    got = json.loads(json.dumps(row.values))
    for key in ("rmia_auc", "rmia_tpr_1pct"):  # its population is of the forgotten classes since
        assert want.pop(key) != got[key]
    for key, value in flat(want).items():
        near = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
        assert flat(got)[key] == near, key


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Every number or text of a nested row by its place."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in flat(item, f"{where}/{name}").items()}
    return {where: value}
