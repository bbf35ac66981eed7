"""A whole job from one file, and evaluation by folder: by the records, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from letheon.launch.jobs.find_runs import find_runs
from tests.launch_tools import Scripts

RECIPE = """
data = "digits"
[train]
epochs = 6
lr = 0.1
[forget]
forget = "class:3"
[[forget.methods]]
name = "retrain"
epochs = 1
[[forget.methods]]
name = "salun"
density = 0.5
inner = { name = "random-label", epochs = 1, lr = 0.01 }
[[forget.methods]]
name = "random-network"
[evaluate]
batch_size = 512
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_job_trains_forgets_and_evaluates_and_goes_on(
    recipe: Path, scripts: Scripts, tmp_path: Path
) -> None:
    out = tmp_path / "job"
    ended = scripts("run", recipe, "--out", out, "--json")
    assert ended.code == 0, ended.err
    rows = {row["name"]: row for row in json.loads(ended.out)["facts"]["rows"]}
    roles = {name: row["role"] for name, row in rows.items()}
    assert roles == {
        "original": "original", "retrain": "retrained", "salun": "unlearned",
        "random-network": "control",
    }  # fmt: skip
    settings = json.loads((out / "salun" / "settings.json").read_text(encoding="utf-8"))
    assert settings["method"]["density"] == 0.5
    assert settings["method"]["inner"]["recipe"]["lr"] == 0.01
    assert (out / "table" / "evaluation.json").is_file()

    found = find_runs(out)
    assert found.find_original() == out / "original" and found.retrained == (out / "retrain",)
    assert found.runs == (out / "random-network", out / "salun")

    table = out / "table" / "evaluation.json"
    before = table.stat().st_mtime_ns
    ended = scripts("run", recipe, "--out", out, "--json")
    assert ended.code == 0 and f"{out}/table: already done by the same command" in ended.err
    assert table.stat().st_mtime_ns == before and "measure" not in ended.err
    again = {row["name"]: row for row in json.loads(ended.out)["facts"]["rows"]}
    assert {name: row["FA"] for name, row in again.items()} == {
        name: row["FA"] for name, row in rows.items()
    }

    weights = {p: p.stat().st_mtime_ns for p in out.glob("*/weights.safetensors")}
    (out / "salun" / "run.json").unlink()
    ended = scripts("run", recipe, "--out", out)
    assert ended.code == 0, ended.err
    assert "finished before, and left out: retrain, random-network" in ended.err
    assert "table: already done" not in ended.err and table.stat().st_mtime_ns > before
    again = {p: p.stat().st_mtime_ns for p in out.glob("*/weights.safetensors")}
    assert {p.parent.name for p in again if again[p] != weights[p]} == {"salun"}

    ended = scripts("run", recipe, "--out", out, "--seed", "2")
    assert ended.code == 2 and "another recipe or seed" in ended.err

    ended = scripts("evaluate", out, "--json")
    assert {row["name"]: row["role"] for row in json.loads(ended.out)["facts"]["rows"]} == roles

    recipe.write_text(
        f'data = "digits"\n[forget]\nweights = "{out / "original"}"\nforget = "class:8"\n'
        '[[forget.methods]]\nname = "grad-ascent"\nepochs = 1\nlr = 1e-4\n'
    )
    ended = scripts("run", recipe, "--out", tmp_path / "one", "--json")
    assert ended.code == 0, ended.err
    names = [row["name"] for row in json.loads(ended.out)["facts"]["rows"]]
    assert names == ["original", "grad-ascent"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[evaluate]", "[evalute]"), "did you mean evaluate"),
        (("[[forget.methods]]", "[[forget.method]]"), "without a method"),
        (('"salun"', '"saluun"'), "job.toml, [[forget.methods]] saluun: got method 'saluun'; "),
        (("density", "densty"), "job.toml, [[forget.methods]] salun: got densty; "),
        (("lr = 0.01", "lr = -1"), "job.toml, [[forget.methods]] salun: got lr -1"),
        (('"class:3"', '"class:3"\ndensty = 1'), "job.toml, [forget]: got densty; "),
        (("[train]", "[train"), "expected TOML"),
        (("epochs = 6", "epoch = 6"), "job.toml, [train]: got epoch; "),
        (("lr = 0.1", 'lr = "fast"'), "job.toml, [train]: got lr fast; expected a number"),
        (("batch_size", "bach_size"), "job.toml, [evaluate]: got bach_size; "),
        (('data = "digits"', 'data = "digits"\nlodaer = "auto"'), "job.toml: got lodaer; "),
        (('"class:3"', '"class:eleven"'), "job.toml, [forget]: forget: got the unknown class"),
        (('data = "digits"', 'data = "/no/set"'), "job.toml: data: got /no/set, which does not"),
        (("[evaluate]", '[evaluate]\ndownstream = "/no/set"'), "[evaluate]: downstream: got /no"),
    ],
)
def test_a_mistake_in_the_file_is_named_before_anything_is_written(
    change: tuple[str, str], said: str, recipe: Path, scripts: Scripts, tmp_path: Path
) -> None:
    recipe.write_text(RECIPE.replace(*change), encoding="utf-8")
    ended = scripts("run", recipe, "--out", tmp_path / "job")
    assert ended.code == 2 and said in ended.err and len(ended.err.splitlines()) == 1
    assert "--" not in ended.err.replace(" --help", "")  # the file has keys, no options
    assert not (tmp_path / "job" / "original").exists()


def test_a_file_that_was_refused_may_be_mended_until_a_run_has_begun(
    recipe: Path, scripts: Scripts, tmp_path: Path
) -> None:
    out = tmp_path / "job"

    def refusal(data: str, comment: str = "") -> str:
        text = RECIPE.replace('"digits"', f'"{tmp_path / data}"')
        recipe.write_text(comment + text, encoding="utf-8")
        ended = scripts("run", recipe, "--out", out)
        assert ended.code == 2 and not (out / "original").exists()
        return ended.err

    assert "nowhere" in refusal("nowhere")
    assert "elsewhere" in refusal("elsewhere")  # the file was kept, but no run stands for it
    (out / "salun").mkdir()
    (out / "salun" / "origin.json").write_text("{}")
    assert "elsewhere" in refusal("elsewhere", "# a comment\n")
    assert "another recipe or seed" in refusal("nowhere")


def test_a_folder_without_runs_is_refused(scripts: Scripts, tmp_path: Path) -> None:
    ended = scripts("evaluate", tmp_path)
    assert ended.code == 2 and "holds no finished run" in ended.err
