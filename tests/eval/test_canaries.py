"""Canaries: what is drawn and planted, what a model remembers of them, and a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest, rankdata

import letheon
from letheon.engine.checkpoints.model_file import load_model, save_model
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.engine.recipe import Recipe
from letheon.engine.runs.stop import Stopped
from letheon.errors import InputError, NotMeasurable
from letheon.eval.case import Case, Peers, Subject
from letheon.eval.inference.passes import Passes
from letheon.eval.membership import canaries
from letheon.eval.membership.canaries import recall
from letheon.eval.metrics.confusion import knn_confusion
from letheon.eval.outputs import Outputs
from letheon.eval.probes.linear import probe_few_shot, probe_forgotten, probe_retained
from letheon.eval.probes.prototypes import attack_class_means, attack_prototype
from letheon.eval.report.rows import prepare
from letheon.eval.report.tables import as_text
from letheon.eval.row_builder import build_row
from letheon.launch import evaluate, forget, train
from letheon.loaders.canaries import Canaries, CanaryOptions, draw_canaries, plant
from letheon.loaders.datasets.digits import upstream
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import forget_mask, leave_out_earlier, resolve
from letheon.loaders.views import list_notes
from letheon.methods.finetune import Finetune
from letheon.methods.head_distillation import HeadDistillation
from letheon.methods.retrain import Retrain
from letheon.methods.train import Train
from tests.launch_tools import Scripts
from tests.pool import on_ranks
from tests.test_resume import stop_after
from tests.world import images, network

TRAIN, TEST = upstream()
DIGITS = Data(TRAIN, TEST, tuple((name,) for name in TRAIN.classes))


def test_labels_are_drawn_evenly_among_the_wrong_ones_and_by_the_seed_alone() -> None:
    options = CanaryOptions(canaries=900)
    of = draw_canaries(options, DIGITS, seed=1)
    assert of is not None and of == draw_canaries(options, DIGITS, seed=2)
    numbers, planted, true = map(np.array, (of.numbers, of.labels, of.true_labels))
    assert (np.diff(numbers) > 0).all() and (true == TRAIN.labels[numbers]).all()
    steps = np.bincount((planted - true) % 10, minlength=10)
    assert steps[0] == 0 and np.abs(steps[1:] - 100).max() < 40  # 4 standard deviations
    assert of != draw_canaries(replace(options, canaries_seed=1), DIGITS, seed=1)
    among = draw_canaries(CanaryOptions(20, "class:3,8"), DIGITS, seed=1)
    assert among is not None and set(among.true_labels) == {3, 8}
    drawn = draw_canaries(CanaryOptions(20, "random-samples:5%"), DIGITS, seed=7)
    request = resolve("random-samples:5%", DIGITS, 7)
    assert drawn is not None and set(drawn.numbers) <= set(request.samples or ())
    assert draw_canaries(CanaryOptions(), DIGITS, 1) is None
    for bad in (CanaryOptions(-1), CanaryOptions(2000), CanaryOptions(0, "class:3")):
        with pytest.raises(InputError):
            draw_canaries(bad, DIGITS, 1)


def test_a_canary_belongs_to_the_class_that_it_shows() -> None:
    of = draw_canaries(CanaryOptions(30, "class:3,8"), DIGITS, 1)
    assert of is not None
    data = plant(DIGITS, of)
    assert data.train.digest != TRAIN.digest and (data.train.true_labels == TRAIN.labels).all()
    assert (data.train.labels != TRAIN.labels).sum() == 30 and data.test is TEST
    request = resolve("class:3,8", data)
    mask = forget_mask(request, data.train.true_labels)
    assert (mask == np.isin(TRAIN.labels, (3, 8))).all()
    assert resolve("canaries", data).samples == of.numbers
    with pytest.raises(InputError, match="no canaries"):
        resolve("canaries", DIGITS)
    # What was forgotten earlier is taken out with its canaries; the others keep their labels.
    rest, forget_rows = leave_out_earlier(
        data, resolve("class:0", data), (resolve("class:3", data),)
    )
    kept = TRAIN.labels != 3
    assert (rest.train.labels == data.train.labels[kept]).all()
    assert (rest.train.true_labels == TRAIN.labels[kept]).all()
    assert (forget_rows == (TRAIN.labels == 0)[kept]).all()
    facts = json.loads(json.dumps(of.__dict__))
    assert Canaries.from_facts(facts, "x") == of
    facts["labels"][0] = (facts["labels"][0] + 1) % 10
    with pytest.raises(InputError, match="digest"):
        Canaries.from_facts(facts, "x")
    with pytest.raises(InputError, match="those it was trained on"):
        plant(replace(DIGITS, train=TEST), of)


def test_other_images_are_measured_without_canaries(tmp_path: Path) -> None:
    model = build("small", 10, seed=1)
    model.class_names = TRAIN.classes
    model.canaries = draw_canaries(CanaryOptions(9), replace(DIGITS, train=TEST), 1)
    save_model(tmp_path / "o.safetensors", model)
    settings = evaluate.Settings(original=tmp_path / "o.safetensors", forget="class:3")
    with pytest.raises(InputError, match="9 canaries in"):
        settings.comparison(Ranks())
    found = replace(settings, other_images=True, random_control=True).comparison(Ranks())
    assert not found.canaries and (found.data.train.labels == TRAIN.labels).all()
    assert [entry.name for entry in found.entries] == ["o", "random"]
    assert any("canaries of the original are not planted" in n for n in list_notes(found.sets))


def test_recall_is_its_definition_and_calibrated() -> None:
    draw = np.random.default_rng(0)
    true = draw.integers(0, 6, 40)

    def planted() -> np.ndarray:  # type: ignore[type-arg]
        wrong = draw.integers(0, 5, 40)
        return wrong + (wrong >= true)

    labels, logits = planted(), draw.normal(size=(40, 6))
    logits[0, :3] = 1.0  # ties
    found = recall(logits, labels, true)
    wrong = [np.delete(row, t) for row, t in zip(logits, true, strict=True)]
    ranks = [
        (rankdata(w)[list(np.delete(np.arange(6), t)).index(p)] - 1) / 4
        for w, t, p in zip(wrong, true, labels, strict=True)
    ]
    assert found.rank == pytest.approx(np.mean(ranks))
    assert found.recovery == np.mean(logits.argmax(1) == labels)
    assert found.chance == pytest.approx(np.mean(logits.argmax(1) != true) / 5)
    learned = recall(logits + 9 * np.eye(6)[labels], labels, true)
    assert learned.recovery == learned.rank == 1 and learned.p < 1e-9
    knows = recall(logits + 9 * np.eye(6)[true], labels, true)  # it generalizes, and never saw them
    assert knows.recovery == knows.chance == 0 and knows.rank == pytest.approx(found.rank)
    # Whatever a model answers, labels that it never saw give p-values as even as sums of ranks,
    # which are whole numbers, can be, and this chance.
    many = [recall(logits, planted(), true) for _ in range(1000)]
    assert kstest([one.p for one in many], "uniform").statistic < 0.08
    assert kstest([one.p for one in many], "uniform", alternative="greater").statistic < 0.03
    assert np.mean([one.recovery for one in many]) == pytest.approx(found.chance, abs=0.01)
    with pytest.raises(NotMeasurable, match="two classes"):
        recall(np.ones((3, 2)), np.ones(3, int), np.zeros(3, int))
    with pytest.raises(NotMeasurable, match="none of the canaries"):
        recall(np.ones((0, 4)), np.ones(0, int), np.zeros(0, int))


def test_the_level_of_p_holds_for_few_canaries_of_few_classes() -> None:
    draw = np.random.default_rng(1)
    true, logits = draw.integers(0, 3, 12), draw.normal(size=(12, 3))
    steps = draw.integers(1, 3, (4000, 12))
    found = np.array([recall(logits, (true + step) % 3, true).p for step in steps])
    for level in (0.01, 0.05, 0.1, 0.3):
        assert np.mean(found <= level) <= level + 2 * np.sqrt(level / 4000), level
    # Of two wrong labels the upper one is drawn by a coin: the sum is binomial.
    ups = np.random.default_rng(2).integers(0, 2, 12)
    wrong = np.array([np.delete(np.arange(3), t) for t in true])
    order = np.take_along_axis(logits, wrong, 1).argsort(axis=1)
    planted = np.take_along_axis(wrong, order, 1)[np.arange(12), ups]
    assert recall(logits, planted, true).p == pytest.approx(binom.sf(ups.sum() - 1, 12, 0.5))


def test_p_of_many_canaries_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(3)
    true, logits = draw.integers(0, 10, 60), draw.normal(size=(60, 10))
    planted = (true + draw.integers(1, 10, 60)) % 10
    exact = recall(logits, planted, true).p
    monkeypatch.setattr(canaries, "EXACT", 0)
    near = recall(logits, planted, true).p
    assert near != exact and near == pytest.approx(exact, abs=0.003)


def _planted(request: str = "") -> tuple[Case, Case]:
    """A model of clean features under planted labels, and under the classes that images show."""
    draw = torch.Generator().manual_seed(0)
    shown = torch.arange(90) % 3
    features = torch.eye(3)[shown] + 0.3 * torch.randn(90, 3, generator=draw)
    known = {number: int(shown[number]) for number in range(1, 75, 3)}  # all show class 1
    labels = shown.clone()
    labels[list(known)] = 2
    cases = []
    for own in (labels, shown):
        train = Outputs(features, features, own, shown == 1, torch.arange(90))
        test = Outputs(features, features, shown, shown == 1, torch.arange(90))
        peers = Peers(forgotten=(1,), names=("a", "b", "c"), canaries=known, request=request)
        cases.append(Case(Subject(Passes("m", {"train": train, "test": test})), peers))
    return cases[0], cases[1]


def test_probes_and_neighbors_read_the_classes_that_canaries_show() -> None:
    planted, shown = _planted()
    for measure in (
        attack_prototype, attack_class_means, probe_forgotten, probe_retained, probe_few_shot,
        knn_confusion,
    ):  # fmt: skip
        assert measure(planted) == measure(shown), measure
    assert attack_class_means(planted) > 0.9 < probe_forgotten(planted)
    assert (planted.train.labels != shown.train.labels).sum() == 25  # the table itself is as it was


def test_no_chance_is_known_where_the_original_ranked_the_request() -> None:
    keys = ("canary_rank", "canary_p", "canary_chance")
    for request in ("hardest:30%", "easiest:40,loss", "hardest:30%,confidence"):
        row = build_row(_planted(request)[0])
        assert all("ranked by the planted labels" in row.why[key] for key in keys)
        assert row.values["canary_recovery"] is not None and row.values["canaries"]["forget"] == 25
    row = build_row(_planted("random-samples:30%")[0])
    assert all(row.values[key] is not None for key in keys)


def test_nothing_is_asked_where_none_were_planted() -> None:
    case = Case(Subject(Passes("a", {"train": _few(), "test": _few()})))
    assert not any(key.startswith("canar") for key in build_row(case).values)


def _few() -> Outputs:
    labels = torch.arange(8) % 2
    return Outputs(torch.ones(8, 2), torch.zeros(8, 2), labels, labels == 1, torch.arange(8))


@pytest.mark.slow
def test_a_run_with_canaries_hands_them_on_and_a_hidden_memory_is_found(
    tmp_path: Path, scripts: Scripts
) -> None:
    long = Recipe(epochs=30, lr=0.1, schedule="cosine", batch_size=32)
    original = train.Settings(
        out=tmp_path / "o", method=Train(long), planting=CanaryOptions(40, "class:3,8")
    )
    train.main(original, Ranks())
    of = load_model(tmp_path / "o").canaries
    assert of is not None and set(of.true_labels) <= {3, 8}
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["canaries"] == {"count": 40, "digest": of.digest}
    short = Recipe(epochs=6, lr=0.1, schedule="cosine")
    methods = {"retrain": Retrain(short), "head": HeadDistillation(Recipe(epochs=4, lr=0.1))}
    for name, method in methods.items():
        settings = forget.Settings(
            weights=tmp_path / "o", forget="class:3,8", out=tmp_path / name, method=method
        )
        forget.main(settings, Ranks())
        assert load_model(tmp_path / name).canaries == of
    # Other canaries than those of the folder's run are another run.
    ended = scripts("train", "--out", tmp_path / "o", "--canaries", 30, "--canaries-among",
                    "class:3,8", "--epochs", 30, "--lr", 0.1, "--schedule", "cosine",
                    "--batch-size", 32)  # fmt: skip
    assert ended.code == 2 and "planting.canaries 40 before, 30 now" in ended.err
    evaluate.main(
        evaluate.Settings(
            original=tmp_path / "o", runs=(tmp_path / "head", tmp_path / "retrain"),
            out=tmp_path / "table",
        ),
        Ranks(),
    )  # fmt: skip
    rows = json.loads((tmp_path / "table" / "metrics.json").read_text())["rows"]
    found = {row["name"]: row for row in rows}
    assert found["o"]["canary_p"] < 1e-3 and found["head"]["canary_p"] < 0.02
    assert found["retrain"]["canary_p"] > 0.02
    assert found["head"]["counts"]["FA"][1] == (np.isin(TRAIN.labels, (3, 8))).sum()
    line = next(x for x in as_text(prepare(rows)).splitlines() if x.startswith("verdict: head"))
    assert "of 40 canaries by their planted label (chance" in line


def test_python_hands_canaries_on() -> None:
    once, of = Recipe(epochs=1, lr=0.01, batch_size=16), CanaryOptions(5)
    data, net = images(), network()
    first = letheon.train(net, train=data, method=Train(once), planting=of, workers=0)
    assert first.canaries is not None and len(first.canaries.numbers) == 5
    second = letheon.forget(
        first, train=data, forget=[2], method=Finetune(once), accept_chance=True
    )  # fmt: skip
    assert second.canaries == first.canaries
    (row,) = letheon.evaluate(unlearned=second, train=data, forget="canaries")
    assert row["canaries"]["forget"] == 5 == row["counts"]["FA"][1]
    assert "fewer than 10" in row["why"]["canary_p"]
    with pytest.raises(InputError, match="leave them out"):
        letheon.train(first, train=data, method=Train(once), planting=of)


def train_planted(ranks: Ranks) -> tuple[str, list[float]]:
    """Train the small world with canaries on this many ranks: their digest, and the weights."""
    recipe = Recipe(epochs=2, lr=0.05, batch_size=16, batch_norm="frozen")
    made = letheon.train(
        network(), train=images(), method=Train(recipe), planting=CanaryOptions(12), device="cpu"
    )
    assert made.canaries is not None
    return made.canaries.digest, made.model.head.weight.flatten().tolist()  # type: ignore[union-attr]


def test_two_ranks_learn_the_same_canaries() -> None:
    ((digest, weights),) = on_ranks(1, train_planted)
    for other, own in on_ranks(2, train_planted):
        assert other == digest and own == pytest.approx(weights, abs=2e-5)


def test_a_stopped_run_goes_on_with_its_canaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=2, lr=0.05, batch_size=16)

    def run(out: str, count: int = 12) -> letheon.Result:
        return letheon.train(network(), train=images(), method=Train(recipe), out=tmp_path / out,
                             planting=CanaryOptions(count), device="cpu",
                             saving=SaveOptions("1steps"))  # fmt: skip

    with monkeypatch.context() as context:
        stop_after(context, 3)
        with pytest.raises((Stopped, SystemExit)):  # the latter where Letheon hears the signals
            run("stopped")
    with pytest.raises(InputError, match=r"planting.canaries 12 before, 11 now"):
        run("stopped", 11)
    goes_on, whole = run("stopped"), run("whole")
    assert goes_on.record["resumed"] and goes_on.record["weights"] == whole.record["weights"]
    plain = letheon.train(network(), train=images(), method=Train(recipe), device="cpu")
    assert plain.record["weights"] != whole.record["weights"]
