"""Strata of the forget set: which images they hold, and what the audit shows of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from letheon.errors import InputError
from letheon.eval.audit.strata import list_strata
from letheon.eval.audit.tables import as_audit
from letheon.eval.case import Case, Peers, Subject
from letheon.eval.comparison import assemble_comparison
from letheon.eval.inference.passes import Passes
from letheon.eval.metrics.strata import THIRDS, strata
from letheon.eval.outputs import Outputs
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import request_samples
from tests.world import images


def outputs(seed: int) -> Outputs:
    draw = np.random.default_rng(seed)
    logits = torch.from_numpy(draw.normal(size=(50, 4))).float()
    labels = torch.from_numpy(np.random.default_rng(9).integers(0, 4, 50))
    return Outputs(torch.zeros(50, 2), logits, labels, torch.arange(50) % 5 > 0, torch.arange(50))


def test_strata_are_their_definition() -> None:
    model, original = outputs(1), outputs(2)
    groups = tuple("ab"[number % 2] for number in range(50))
    of = Peers(Subject(Passes("o", {"train": original})), names=tuple("wxyz"), groups=groups)
    found = strata(Case(Subject(Passes("m", {"train": model})), of))
    gone = np.flatnonzero(model.forget.numpy())
    labels = model.labels.numpy()[gone]

    def odds(outputs: Outputs) -> Any:
        e = np.exp(outputs.logits.double().numpy()[gone])
        return (e / e.sum(1, keepdims=True))[np.arange(len(gone)), labels]

    right = model.logits.numpy()[gone].argmax(1) == labels
    order = np.argsort(odds(original))
    wanted = {"memorization": dict(zip(THIRDS, np.array_split(order, 3), strict=True))}
    wanted["class"] = {name: np.flatnonzero(labels == k) for k, name in enumerate("wxyz")}
    wanted["group"] = {name: np.flatnonzero(gone % 2 == k) for k, name in enumerate("ab")}
    assert {kind: list(of) for kind, of in found.items()} == {k: list(w) for k, w in wanted.items()}
    for kind, parts in wanted.items():
        for name, rows in parts.items():
            got = found[kind][name]
            if kind == "memorization":  # 40 images: 14, 13, 13
                assert got["images"] in (13, 14)
            else:
                assert got["images"] == len(rows)
    first = order[: found["memorization"][THIRDS[0]]["images"]]
    assert found["memorization"][THIRDS[0]]["accuracy"] == pytest.approx(right[first].mean())
    assert found["memorization"][THIRDS[0]]["confidence"] == pytest.approx(
        odds(model)[first].mean(), abs=1e-6
    )
    some = found["group"]["a"]
    assert some["accuracy"] == pytest.approx(right[wanted["group"]["a"]].mean())
    alone = strata(Case(Subject(Passes("m", {"train": model}))))
    assert list(alone) == ["class"]  # no original: nobody knows what was memorized


def row(name: str, role: str, sure: float) -> dict[str, Any]:
    stratum = {"images": 9, "accuracy": sure, "confidence": sure}
    return {"name": name, "role": role, "FA": sure, "strata": {"class": {"ant": stratum}}}


def test_the_audit_marks_what_lies_outside() -> None:
    others = [row(f"r{i}", "retrained", 0.1 + i / 1000) for i in range(5)]
    rows = [*others, row("leak", "unlearned", 0.5), row("fine", "unlearned", 0.102)]
    (table,) = list_strata(rows)
    assert "| leak | **50.0% (> 99)** |" in table and "| fine | 10.2% (+0.0) |" in table
    assert table.splitlines()[0] == "| by class | ant (9) |" and table in as_audit(rows)
    assert list(list_strata([{"name": "a", "role": "unlearned", "FA": 0.1}])) == []


def test_groups_are_one_line_an_image(tmp_path: Any) -> None:
    data = images()
    whole = Data(data, data, tuple((name,) for name in data.classes))
    of = assemble_comparison([], whole, {}, request_samples("x", [0, 1], whole))
    names = [f"g{number % 3}" for number in range(len(data))]
    (tmp_path / "groups").write_text("\n".join(names) + "\n", encoding="utf-8")
    assert of.read_groups(tmp_path / "groups") == tuple(names)
    (tmp_path / "short").write_text("a\n", encoding="utf-8")
    for file, text in (("short", "got 1 lines"), ("none", "cannot be read")):
        with pytest.raises(InputError, match=text):
            of.read_groups(tmp_path / file)
