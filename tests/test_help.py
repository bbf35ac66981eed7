"""What --help shows: everyday options first, groups, units, an example; of a method its page."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

import pytest

from letheon.engine.method import Method
from letheon.engine.recipe import Recipe
from letheon.launch.console.everyday import EVERYDAY, EXAMPLES, UNITS
from letheon.launch.console.help import describe_method, show_help
from letheon.launch.console.options import list_method_options, list_options
from letheon.methods import METHODS, catalogue
from tests.launch_tools import ROOT, SCRIPTS, Scripts
from tests.test_readme import check_script

FACTORS = {
    "momentum", "weight_decay", "mean", "std", "temperature", "bias_rate", "head_rate",
}  # fmt: skip
"""Numbers that count nothing."""


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def page(script: str, *words: str) -> str:
    return show_help(script, SCRIPTS[script].Settings, words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_option_is_there_once_after_those_of_every_day(script: str) -> None:
    text = page(script)
    assert max(map(len, text.splitlines())) <= 80
    options = list_options(SCRIPTS[script].Settings)
    heads = re.findall(r"^  (--(?:no-)?[\w-]+|[A-Z]+)(?=\s|$)", text, re.M)
    turned = [
        f"--no-{one.flag[2:]}" if one.kind is bool and one.default is True else one.flag
        for one in options
    ]
    assert sorted(heads) == sorted([*turned, "--quiet", "--json"])
    everyday = EVERYDAY.get(script, ())
    assert len(everyday or options) <= 10
    assert set(everyday) <= {one.name for one in options}
    at = text.index("Everyday options\n" if everyday else "Options\n")
    first = text[at : text.index("\n\n", at)]
    for name in everyday:
        assert re.search(rf"^  (--{name.replace('_', '-')}|{name.upper()})\b", first, re.M), name
    missing = {one.name for one in options if one.required} - {*everyday} if everyday else set()
    assert not missing, "a required option is one of every day"
    assert [one.flag for one in options if not one.text] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_narrow_terminal_has_narrow_pages(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = page(script)
    if script == "forget":
        text += "\n" + page(script, "salun", "random-label")
    lines = [line.strip().removesuffix(" \\") for line in text.splitlines() if len(line) > 40]
    assert [line for line in lines if " " in line] == [], "longer than the page, and not one word"


def test_every_number_has_a_unit_or_is_a_factor() -> None:
    numbers = {
        one.name
        for script in SCRIPTS.values()
        for one in list_options(script.Settings)
        if re.search(r"\b(int|float)\b", str(one.kind))
    }
    assert numbers - UNITS.keys() == FACTORS


@pytest.mark.parametrize("script", EXAMPLES)
def test_the_example_can_be_typed(script: str) -> None:
    check_script(script, shlex.split(EXAMPLES[script]))
    flat = re.sub(r" \\\n\s+", " ", page(script))
    assert flat.endswith(f"\n\nExample\n  letheon {script} {EXAMPLES[script]}")


def test_every_script_has_an_example() -> None:
    assert EXAMPLES.keys() == SCRIPTS.keys()


def test_the_first_screen_of_forget() -> None:
    assert page("forget").splitlines()[:14] == [
        "usage: letheon forget --weights PATH --forget REQUEST --out PATH [options]",
        "METHOD [its options]",
        "",
        "Make a trained network forget what --forget names.",
        "",
        "Several runs are fed from one pass over the data: `METHOD options + METHOD",
        "options`, and a list of numbers (--lr 0.1,0.01) after an option of a method or",
        "after --seed. Each is then a folder in --out.",
        "",
        "Everyday options",
        "  --weights PATH          The original model: a run folder of train.py, or a",
        "                          checkpoint from elsewhere. (required)",
        "  --forget REQUEST        Classes: class:3,8 (ids, names or WordNet ids),",
        "                          file:LIST, random:100 or top:100. Training samples:",
    ]


def test_the_page_of_a_method() -> None:
    lines = page("forget", "--weights", "a", "lfssd", "--help").splitlines()
    at = lines.index("  known as    LFSSD")
    assert lines[at : at + 6] == [
        "  known as    LFSSD",
        "  definition  as ssd, with I the mean absolute gradient of the squared norm of",
        "              the logits; our reading",
        "  reads       all, once",
        "  cost        N + N_f g",
        "  source      Foster et al. 2024 (loss-free)",
    ]
    text = page("forget", "scrub", "--rewind")
    assert "  --max-epochs EPOCHS     First epochs that climb" in text
    assert "  --lr RATE               Peak learning rate. (default: 0.0005)" in text
    start = text.index("Published settings")
    assert "\n  cifar10-resnet18/scrub\n" in text[start:] and "Kurmanji" in text[start:]


def test_the_page_of_a_method_around_another_shows_both() -> None:
    text = page("forget", "salun", "--leak", "random-label")
    assert text.index("Options of salun") < text.index("Options of random-label")
    assert page("forget", "--weights", "salun") == page("forget"), "the value of an option"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_and_the_same_row_in_the_docs(name: str) -> None:
    method = METHODS[name]
    facts = method.definition
    assert (
        facts is not None
        and facts.formula
        and facts.cost
        and (facts.source or facts.reads == "none")
    )
    row = f"| `{name}` | {' | '.join(facts)} |"
    assert row in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    lines = list(describe_method(method, 80))
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert all(" ".join(fact.split()) in text for fact in facts)
    for option in list_method_options(method):
        assert option.text, option.flag
        assert f" {option.flag}" in text or f" --no-{option.flag[2:]}" in text


def test_a_method_without_a_definition_shows_its_docstring() -> None:
    @dataclass(frozen=True)
    class Mine(Method):
        """Mine: does nothing."""

        name = "mine"
        recipe: Recipe = Recipe(epochs=2)

    lines = list(describe_method(Mine, 80))
    assert lines[0] == "mine: Mine: does nothing." and not any(
        line.startswith("  cost ") for line in lines
    )


def test_the_commands(scripts: Scripts) -> None:
    ended = scripts("forget", "finetune", "--help")
    assert ended.code == 0 and ended.out.startswith("finetune: ")
    ended = scripts("methods")
    assert ended.code == 0 and all(f"\n  {name} " in ended.out for name in catalogue())
    ended = scripts("methods", "munba")
    assert ended.code == 0 and "Wu and Harandi 2025" in ended.out
    ended = scripts("forget", "--weights", "a", "finetun", "--help")
    assert ended.code == 2 and ended.out == "" and "did you mean finetune?" in ended.err
    ended = scripts("methods", "mumba")
    assert ended.code == 2 and "did you mean munba?" in ended.err
