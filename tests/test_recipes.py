"""Recipes: every file parses as the method it names; what is typed wins; the record says which."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from letheon.engine.method import Method
from letheon.launch import forget
from letheon.launch.command import parse
from letheon.launch.records.replay import method_words
from letheon.launch.tuning.recipe_file import FOLDER, list_recipes, read_recipe
from letheon.methods import catalogue, inner_fields
from letheon.methods.salun import SalUn
from tests.launch_tools import Scripts

CALL = ("--weights", "w", "--forget", "class:3", "--out", "o")
SALUN = "digits-small-classes/salun"


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_every_recipe_is_a_run(every: int) -> None:
    """Each setting of a file is one of the method's, and arrives there."""
    recipes, known = list_recipes(), catalogue()
    assert len(recipes) == len(list(FOLDER.glob("*/*.toml"))) > 60
    for recipe in recipes[::every]:
        method = known[recipe.method["name"]]
        words = list(method_words(recipe.method, Path(recipe.name)))
        if inner_fields(method):
            [settings] = forget.read([*CALL, "--recipe", recipe.name])
            assert settings.recipe == recipe.mark
            check(recipe.method, settings.method)
        else:
            check(recipe.method, parse(method, words[1:]))


def check(table: Mapping[str, object], method: Method) -> None:
    assert method.name == table["name"]
    own = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    for key, value in table.items():
        name = key.replace("-", "_")
        if key == "recipe":  # as `letheon tune` writes it
            assert isinstance(value, dict)
            check({"name": table["name"], **value}, method)
        elif isinstance(value, dict):
            check(value, getattr(method, name))
        elif key != "name":
            holder = method if name in own else method.recipe
            held = getattr(holder, name)
            assert (list(held) if isinstance(held, tuple) else held) == value, (table, key)


def test_what_stands_after_it_wins_and_lists_are_several_runs() -> None:
    words = f"--seed 1,2 --recipe {SALUN} --density 0.2 --lr 0.3,0.1 + spkd".split()
    runs = forget.read([*CALL, *words])
    assert len(runs) == 6
    first = runs[0].method
    assert isinstance(first, SalUn) and first.density == 0.2
    assert (first.inner.recipe.lr, first.inner.recipe.epochs) == (0.3, 6)
    assert [run.seed for run in runs] == [1, 1, 2, 2, 1, 2]
    assert runs[-1].recipe is None and runs[-1].method.name == "spkd"


def test_the_record_keeps_it_and_a_replay_needs_no_recipe(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    text = (FOLDER / "digits-small-classes" / "finetune.toml").read_text()
    file.write_text(text.replace("epochs = 10", "epochs = 1"))
    args = ("--weights", original, "--forget", "class:3")
    ended = scripts("forget", *args, "--out", tmp_path / "a", "--recipe", file)
    assert ended.code == 0, ended.err
    kept = json.loads((tmp_path / "a" / "settings.json").read_text())
    mark = read_recipe(str(file)).mark
    assert kept["recipe"] == mark and kept["method"]["recipe"]["lr"] == 0.1
    assert scripts("recipes", "--show", mark).code == 0
    file.unlink()
    again = ("--config", tmp_path / "a" / "settings.json", "--out", tmp_path / "b")
    assert scripts("forget", *again).code == 0
    kept["out"] = str(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "settings.json").read_text()) == kept
    digests = [json.loads((tmp_path / n / "run.json").read_text())["weights"] for n in "ab"]
    assert digests[0] == digests[1]


BAD = {
    "unknown": ("did you mean", "--recipe digits-small-classes/salum"),
    "a method too": ("names its own", f"--recipe {SALUN} spkd"),
    "another digest": ("has digest", f"--recipe {SALUN}@0000"),
    "no file": ("cannot be read", "--recipe {tmp}/none.toml"),
    "not TOML": ("cannot be read", "--recipe {tmp}/broken.toml"),
    "a field too many": ("with 'rate'", "--recipe {tmp}/extra.toml"),
    "a field too few": ("without 'source'", "--recipe {tmp}/short.toml"),
    "no method": ("has no name", "--recipe {tmp}/nameless.toml"),
    "unknown status": ("of status 'guessed'", "--recipe {tmp}/guessed.toml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes(case: str, scripts: Scripts, tmp_path: Path) -> None:
    text = (FOLDER / f"{SALUN}.toml").read_text()
    files = {
        "broken": "set = ", "extra": f"rate = 1\n{text}",
        "guessed": text.replace("tuned", "guessed"),
        "short": text.replace("source", "knowledge"), "nameless": text.replace("name", "title"),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / f"{name}.toml").write_text(content)
    expected, words = BAD[case]
    ended = scripts("forget", *CALL, *words.format(tmp=tmp_path).split())
    assert ended.code == 2 and expected in ended.err, ended.err
    assert ended.err.startswith("error: --recipe: ") and len(ended.err.splitlines()) == 1


def test_the_list_says_what_each_is_worth(scripts: Scripts) -> None:
    ended = scripts("recipes")
    assert ended.code == 0
    lines = dict(line.split("  ", 1) for line in ended.out.splitlines())
    assert lines.keys() >= {"digits-small-classes/spkd"}
    assert "tuned: launch/recipes/digits.sh" in ended.out
    assert "published, never run: " in ended.out
    wrong = scripts("recipes", "--show", "nosuch")
    assert wrong.code == 2 and wrong.err.startswith("error: --show: got 'nosuch'")
    shown = scripts("recipes", "--show", SALUN)
    assert "options   salun --density=0.5 random-label --epochs=6 --lr=0.02" in shown.out
    assert scripts("forget", "--recipe", "list").code == 0


def test_no_method_has_an_option_of_the_script() -> None:
    """An option of both would be refused by the parser, or hide one of the two."""
    script = {field.name for field in dataclasses.fields(forget.Settings)} - {"recipe"}
    for name, method in catalogue().items():
        assert not script & {field.name for field in dataclasses.fields(method)}, name
