"""Originals and retrained models that are none: refused, or said at the head of the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.errors import InputError
from letheon.eval.audit.conditions import describe_recall
from letheon.eval.audit.tables import as_audit
from letheon.eval.comparison import Entry, assemble_comparison
from letheon.eval.references import list_doubts, read_recipe
from letheon.eval.report import verdict
from letheon.eval.row_builder import Row
from letheon.loaders.canaries import Canaries
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import Request
from tests.eval.test_features import CLASSES, loader

REQUEST = Request("class:2", (2,), None, "d")
SHORT: dict[str, Any] = {"method": {"name": "retrain", "recipe": {"epochs": 2, "lr": 0.1}}}
LONG: dict[str, Any] = {"method": {"name": "train", "recipe": {"epochs": 9, "lr": 0.1}}}


def entry(name: str, role: str, weights: str = "", **more: Any) -> Entry:
    kind = {"original": "training", "retrained": "reference"}.get(role, "unlearning")
    return Entry(name, role, build("small", CLASSES), weights or name, **{"kind": kind, **more})


WHOLE = (entry("o", "original"), entry("r1", "retrained"), entry("r2", "retrained"))
SETS = Data(loader(Ranks()).images, loader(Ranks(), 30).images, ())


def assembled(*more: Entry) -> Any:
    return assemble_comparison([*WHOLE, *more, entry("u", "unlearned")], SETS, {}, REQUEST)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (entry("r3", "retrained", "r1"), r"r1 \(retrained\) and r3 \(retrained\) of the same"),
        (entry("r3", "retrained", "o"), r"o \(original\) and r3 \(retrained\) of the same"),
        (entry("p", "original", "o"), r"o \(original\) and p \(original\) of the same"),
        (entry("r3", "retrained", kind="unlearning"), "a run of unlearning"),
    ],
)
def test_what_is_no_reference_is_refused(odd: Entry, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        assembled(odd)
    assert error.value.option == odd.role
    assert assembled().warnings == []


def test_a_model_trained_on_the_kept_images_alone_is_a_reference_on_trust() -> None:
    (warning,) = assembled(entry("r3", "retrained", kind="training")).warnings
    assert warning.startswith("r3: trained by itself") and "on trust" in warning


def test_an_original_that_forgot_the_request_and_other_shapes_are_refused() -> None:
    forgot = entry("p", "original")
    forgot.model.requests = (Request("class:1", (1,), None, "e"),)  # an earlier one may be
    assembled(forgot)
    forgot.model.requests = (REQUEST,)
    with pytest.raises(InputError, match="p as an original, which has forgotten class:2 itself"):
        assembled(forgot)
    other = replace(entry("r3", "retrained"), model=build("resnet20", CLASSES))
    with pytest.raises(InputError, match="r3, a resnet20 of other shapes than o, a small"):
        assembled(other)


def test_what_may_be_no_reference_is_said_in_every_format() -> None:
    short, long = read_recipe(SHORT), read_recipe(LONG)
    assert short == {"epochs": 2, "lr": 0.1}
    of = assembled(
        entry("r3", "retrained", recipe=long), entry("r4", "retrained", recipe=short),
        entry("r5", "retrained", kind=""), entry("v", "unlearned", "r1"),
    )  # fmt: skip
    found = {doubt.names: doubt.text for doubt in list_doubts(of)}
    assert "r4: trained by another recipe than r3 (epochs 2 for 9)" in found["r4",]
    assert "r5: without a record" in found["r5",] and "weights of r1" in found["v",]
    assert len(found) == 3 and sorted(of.warnings) == sorted(found.values())
    row = Row("r4", "retrained", doubts=[found["r4",]]).as_dict()
    assert verdict.judge([row, {**row, "name": "r6"}]) == [f"beware: {found['r4',]}"]
    assert found["r4",] in as_audit([row])


def test_references_without_the_canaries_of_others_are_said() -> None:
    of = assembled()
    assert not list_doubts(of)
    labels = SETS.train.labels
    marked = Canaries((0,), (int(labels[0] + 1) % CLASSES,), (int(labels[0]),), len(labels), "")
    for one in of.entries:
        one.model.canaries = None if one.name == "r2" else marked
    of = replace(of, data=replace_labels(marked))
    (doubt,) = list_doubts(of)
    assert doubt.names == ("r2",) and "without a record of the 1 canaries" in doubt.text
    for one in of.entries:
        one.model.canaries = None


def replace_labels(canaries: Canaries) -> Data:
    from letheon.loaders.canaries import plant

    return plant(Data(loader(Ranks()).images, loader(Ranks(), 30).images, ()), canaries)


def test_answers_to_the_stored_forget_images_alone_do_not_fool_the_verdict() -> None:
    """One that answers as a retrained model on these, and as the original on everything else."""
    names, near = list("abcd"), {"closer_to_retrained": 1.0, "closer_p": 1e-9}
    shared = {"classes": names, "forgotten": [1], "TRA": 0.9}
    original = {"name": "o", "role": "original", **shared, "TFA": 0.95, "attack_prompt": 1.0}
    retrained = [
        {"name": f"r{i}", "role": "retrained", **shared, "TFA": 0.01 * i, "attack_prompt": 0.1}
        for i in range(4)
    ]
    cheat = {"name": "u", "role": "unlearned", **shared, **near, "TFA": 0.94}
    (line, *_) = verdict.judge([original, *retrained, cheat])
    assert "but it still names 94.0% of the held-out images of the forgotten classes" in line
    assert "(retrained 1.5%, original 95.0%)" in line

    def recall(**values: float) -> str:
        return describe_recall({"name": "u", **values}, [original], retrained)

    assert "one learned offset it names 80.0%" in recall(TFA=0.02, attack_prompt=0.8)
    assert recall(TFA=0.02, attack_prompt=0.2) == recall(TFA=0.3) == recall() == ""
    alike = {**original, "TFA": 0.0}  # where the original is no better, nothing comes back
    assert describe_recall({"name": "u", "TFA": 0.9}, [alike], retrained) == ""
