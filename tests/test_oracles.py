"""Ensembles of reference models: what is made, what goes on, and what evaluate reads of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from letheon.engine.distributed import Ranks
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.eval.evaluate import Extent
from letheon.launch import evaluate
from letheon.launch.ensembles import oracles
from letheon.methods.retrain import Retrain

REQUESTS = ("class:3,8", "class:1")


def settings(out: Path, count: int) -> oracles.Settings:
    method = Retrain(Recipe(epochs=1, lr=0.05))
    return oracles.Settings(
        out=out, forget=REQUESTS, count=count, originals=count, method=method, device="cpu"
    )


@pytest.mark.slow
def test_an_ensemble_grows_and_evaluate_reads_its_outputs(tmp_path: Path) -> None:
    out = tmp_path / "oracles"
    oracles.main(settings(out, 1), Ranks())
    first = (out / "class_3_8" / "retrain-seed1" / "weights.safetensors").read_bytes()
    stored = {path.name for path in (out / oracles.OUTPUTS).iterdir()}
    oracles.main(settings(out, 2), Ranks())
    assert (out / "class_3_8" / "retrain-seed1" / "weights.safetensors").read_bytes() == first
    with pytest.raises(InputError, match=r"differs: method.recipe.lr 0.05 before, 0.1 now"):
        other = replace(settings(out, 2), method=Retrain(Recipe(epochs=1, lr=0.1)))
        oracles.main(other, Ranks())
    originals, retrained, outputs = oracles.find_oracles(out / "class_1")
    assert [path.name for path in originals] == ["original-seed1", "original-seed2"]
    assert [path.name for path in retrained] == ["retrain-seed1", "retrain-seed2"]
    request = json.loads((retrained[1] / "request.json").read_text(encoding="utf-8"))
    assert request["classes"] == [1]
    grown = {path.name for path in outputs.iterdir()}
    assert stored < grown
    table = evaluate.Settings(
        oracles=out / "class_3_8", device="cpu", out=tmp_path / "table",
        extent=Extent(depth="full", attacks=0), accept_chance=True,
    )  # fmt: skip
    evaluate.main(table, Ranks())
    assert {path.name for path in outputs.iterdir()} == grown  # no network was run
    rows = json.loads((tmp_path / "table" / "metrics.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["original"] * 2 + ["retrained"] * 2
    first, second = rows[:2]
    assert first["cka_original"] == pytest.approx(1) and second["cka_original"] < 0.999
    assert (tmp_path / "table" / "audit.md").is_file()


def test_what_is_no_ensemble_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 finished retrained models beside 0 originals"):
        oracles.find_oracles(tmp_path)
    both = evaluate.Settings(oracles=tmp_path, original=tmp_path)
    with pytest.raises(InputError, match="one of them"):
        both.with_oracles()
    others = evaluate.Settings(other_originals=(tmp_path,))
    with pytest.raises(InputError, match="without the original"):
        others.comparison(Ranks())
    with pytest.raises(InputError, match="count 0"):
        oracles.Settings(out=tmp_path, forget=REQUESTS, count=0)
    with pytest.raises(InputError, match="one folder name"):
        oracles.Settings(out=tmp_path, forget=("class:3,8", "class:3 8"))
