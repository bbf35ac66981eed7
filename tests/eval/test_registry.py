"""Metrics and their entries: one definition each, and those of other packages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from letheon.errors import InputError, NotMeasurable, RunFailed
from letheon.eval.case import Case, Subject
from letheon.eval.metrics import registry
from letheon.eval.metrics.registry import Summary, metric, metrics
from letheon.eval.report.definitions import define_all
from letheon.eval.report.write import write_report
from letheon.eval.row_builder import Row, build_row
from tests.eval.test_measure import passes


@metric(
    "mean_label", title="Mean label", group="Oddities", better="low", source="Doe 2026",
    summary=Summary("label", "mean label of the test set", 99),
)  # fmt: skip
def mean_label(case: Case) -> float:
    """Mean class number of the test images."""
    return float(case.test.labels.double().mean())


@metric("failing", title="Failing")
def failing(case: Case) -> float:
    """A metric that always fails."""
    raise ValueError("nothing works")


class Point(EntryPoint):
    """An entry point that gives what stands in this module."""

    def load(self) -> object:
        return {"good": mean_label, "failing": failing, "taken": metrics.__wrapped__}[self.name]


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    points: list[EntryPoint] = [Point("good", "other:mean_label", "letheon.metrics")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    metrics.cache_clear()
    yield points
    metrics.cache_clear()


def test_a_metric_of_another_package_stands_everywhere(
    plugins: list[EntryPoint], tmp_path: Path
) -> None:
    row = build_row(Case(Subject(passes("a", 1))))
    want = float(passes("a", 1).outputs["test"].labels.double().mean())
    assert row.values["mean_label"] == want
    write_report([row.as_dict()], tmp_path)
    document = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    definition = document["definitions"]["mean_label"]
    assert definition["text"] == "Mean class number of the test images. Source: Doe 2026."
    assert (definition["group"], definition["better"]) == ("Oddities", "low")
    for name in ("table.md", "metrics.csv", "metrics.tex", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert ("mean_label" if name == "metrics.csv" else "Mean label") in text
    assert "| label |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"mean_label: {definition['text']} Smaller is better." in list(define_all())


def test_a_broken_plugin_is_named_and_the_others_work(plugins: list[EntryPoint]) -> None:
    plugins.append(EntryPoint("gone", "no_such_module:thing", "letheon.metrics"))
    plugins.append(Point("taken", "other:not_a_metric", "letheon.metrics"))
    with pytest.warns(UserWarning) as warned:
        known = metrics()
    texts = [str(each.message) for each in warned]
    assert any("plug-in gone (no_such_module:thing)" in text for text in texts)
    assert any("plug-in taken" in text and "decorator" in text for text in texts)
    assert "mean_label" in known and "FA" in known


def test_a_plugin_that_fails_on_a_model_gives_its_reason(plugins: list[EntryPoint]) -> None:
    plugins.append(Point("failing", "other:failing", "letheon.metrics"))
    row = build_row(Case(Subject(passes("a", 1))))
    assert row.values["failing"] is None and "nothing works" in row.why["failing"]
    assert row.values["mean_label"] is not None


def test_only_a_missing_ingredient_is_none() -> None:
    row = Row("a")

    def fail(error: Exception) -> float:
        raise error

    row.add(mean_label, lambda: fail(NotMeasurable("no images")))
    assert row.values["mean_label"] is None and row.why["mean_label"] == "no images"
    with pytest.raises(RunFailed, match="nan for mean_label of a"):
        row.add(mean_label, lambda: math.nan)
    with pytest.raises(RunFailed, match="x in mean_label"):
        row.add(mean_label, lambda: {"x": [math.inf]})
    with pytest.raises(InputError, match="bad"):
        row.add(mean_label, lambda: fail(InputError("bad")))


def test_every_metric_is_whole() -> None:
    for key, each in metrics().items():
        of = each.definition(key)
        assert of.title and of.text.endswith(".") and "\n" not in of.text, key
        assert "--" not in of.text, f"{key} names a flag"
        assert of.group in registry.GROUPS, key
        assert each.unit == "table" or not each.schema, key
    assert len({key for each in metrics().values() for key in each.keys}) == 92


def test_a_metric_needs_a_definition() -> None:
    with pytest.raises(InputError, match="without a docstring"):
        metric("bare")(lambda case: 0.0)
