"""Models of known truth before the whole audit: what hides is caught, a true retrain is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from letheon.engine.distributed import Ranks
from letheon.engine.recipe import Recipe
from letheon.eval.report.verdict import LEVEL, ORACLES, p_value
from letheon.launch import evaluate
from letheon.launch.ensembles import oracles
from letheon.methods.retrain import Retrain
from tests.launch_tools import Scripts

EPOCHS, HELD_OUT = 8, 3
COUNT = ORACLES + HELD_OUT
CONTROLS = (
    ("head-distillation",), ("one-point-contraction",), ("no-op",), ("random-network",),
    ("eu-k", "--k", "1", "--epochs", str(EPOCHS), "--lr", "0.1"),  # a retain-only head
)  # fmt: skip


@pytest.mark.slow
def test_controls_are_caught_and_a_true_retrain_is_not(tmp_path: Path, scripts: Scripts) -> None:
    """The digits, 3 and 8 forgotten; 22 retrained models, of which 3 are asked about.

    A quick table is enough: CKA to the original exposes those that answer as a retrained model.
    """
    recipe = Recipe(epochs=EPOCHS, lr=0.1, schedule="cosine")
    oracles.main(
        oracles.Settings(
            out=tmp_path / "of", forget=("class:3,8",), count=COUNT, method=Retrain(recipe),
            device="cpu",
        ),
        Ranks(),
    )  # fmt: skip
    folder = tmp_path / "of" / "class_3_8"
    held = [folder / f"retrain-seed{seed}" for seed in range(ORACLES + 1, COUNT + 1)]
    for path in held:
        path.rename(tmp_path / path.name)
    words = " + ".join(" ".join(one) for one in CONTROLS).split()
    ended = scripts(
        "forget", "--weights", tmp_path / "of" / "original-seed1", "--forget", "class:3,8",
        "--out", tmp_path / "controls", "--device", "cpu", *words,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    runs = sorted((tmp_path / "controls").iterdir())
    assert len(runs) == len(CONTROLS)
    table = evaluate.Settings(
        oracles=folder, runs=(*runs, *(tmp_path / path.name for path in held)), device="cpu",
        out=tmp_path / "table",
    )  # fmt: skip
    evaluate.main(table, Ranks())
    rows: list[dict[str, Any]] = json.loads((tmp_path / "table" / "metrics.json").read_text())[
        "rows"
    ]
    retrained = [row for row in rows if row["role"] == "retrained"]
    assert len(retrained) == ORACLES
    odds = {row["name"]: p_value(row, retrained) for row in rows if row["role"] != "retrained"}
    for run in runs:
        assert odds[run.name] <= LEVEL, run.name
    assert odds["original-seed1"] <= LEVEL
    # Three at once are accused in one case of a hundred.
    accused = [path.name for path in held if odds[path.name] <= LEVEL]
    assert len(accused) < 2, accused
    # By construction one of K + 1 retrained models is the farthest, and no more than one.
    everyone = [*retrained, *(row for row in rows if row["name"] in {path.name for path in held})]
    apart = [
        row for row in everyone if p_value(row, [o for o in everyone if o is not row]) <= LEVEL
    ]
    assert len(apart) == 1
