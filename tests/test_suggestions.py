"""A mistyped name of a closed set is refused with the nearest name that the set has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import letheon
from letheon.engine.models.classifier import build
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.eval.inference.taps import record_taps
from letheon.eval.metrics.registry import metric
from letheon.eval.report.rows import prepare
from letheon.launch import evaluate, forget, train
from letheon.launch.command import parse
from letheon.launch.console import completion
from letheon.launch.console.options import refuse_unknown
from letheon.launch.jobs.run import read_recipe as read_job
from letheon.launch.tuning import tune
from letheon.launch.tuning.ranges import choose_ranges
from letheon.launch.tuning.recipe_file import read_recipe
from letheon.loaders.datasets.digits import upstream
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import resolve, score_of
from letheon.loaders.open import open_data, open_domains
from letheon.loaders.views import align_labels
from letheon.methods import METHODS, inner_fields
from letheon.methods.finetune import Finetune
from letheon.methods.salun import SalUn
from tests.launch_tools import Scripts

RUN = ("--weights", "a", "--forget", "class:1", "--out", "b")


def digits() -> Data:
    images, test = upstream()
    return Data(images, test, tuple((name,) for name in images.classes))


def tiny(**options: Any) -> object:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    images = TensorDataset(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]))
    return letheon.forget(net, train=images, forget=[1], **options)


def job(folder: Path) -> object:
    file = folder / "job.toml"
    file.write_text("[evalute]\n")
    return read_job(file)


def recipe(folder: Path, line: str) -> object:
    file = folder / "mine.toml"
    facts = {"set": "a", "model": "b", "request": "any", "status": "tuned", "source": "c"}
    key, _, value = line.partition("=")
    lines = [f'{name} = "{text}"' for name, text in {**facts, key: value}.items()]
    file.write_text("\n".join([*lines, '[method]\nname = "spkd"']))
    return read_recipe(str(file))


def wrong_metric(**facts: Any) -> object:
    def function() -> float:
        """Share of nothing."""
        return 0.0

    return metric("mine", **facts)(function)


def taps() -> None:
    with record_taps(build("small", 3), ["net.conv3d"]):
        pass


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "option": (lambda _: parse(train.Settings, ["--out", "a", "--modle", "small"]), "--model"),
    "option of every command": (lambda _: parse(train.Settings, ["--quet"]), "--quiet"),
    "option of a method": (lambda _: forget.read([*RUN, "salun", "--densty", "0.5"]), "--density"),
    "choice": (lambda _: parse(train.Settings, ["--out", "a", "--loader", "trch"]), "torch"),
    "choice of a method": (lambda _: forget.read([*RUN, "kd", "--forget-pass=psuedo-label"]),
                           "pseudo-label"),
    "choice of a tracker": (lambda _: forget.read(["--tracker", "mlfow", *RUN, "kd"]), "mlflow"),
    "depth": (lambda _: parse(evaluate.Settings, ["--depth", "ful"]), "full"),
    "method": (lambda _: forget.read([*RUN, "salum"]), "salun"),
    "method inside": (lambda _: forget.read([*RUN, "salun", "random-lable"]), "random-label"),
    "method of several": (lambda _: forget.read([*RUN, "spkd", "+", "scrubb"]), "scrub"),
    "method in Python": (lambda _: tiny(method="finetun"), "finetune"),
    "option in Python": (lambda _: tiny(method="finetune", sed=1), "seed"),
    "choice in Python": (lambda _: tiny(method="finetune", loader="tensr"), "tensor"),
    "setting of a method": (lambda _: tiny(method=Finetune(Recipe(optimizer="adanw"))),  # type: ignore[arg-type]
                            "adamw"),
    "preset": (lambda _: tiny(method="finetune", preset={"siez": 2}), "size"),
    "preset's choice": (lambda _: tiny(method="finetune", preset={"size": 2, "resize": "shrt"}),
                        "short"),
    "model": (lambda _: build("resnet81", 10), "resnet18"),
    "model of timm": (lambda _: build("timm:resnet81", 10), "timm:resnet18"),
    "set": (lambda _: open_data("digit"), "digits"),
    "downstream set": (lambda _: open_domains("digits-varid"), "digits-varied"),
    "class": (lambda _: resolve("class:tow", two()), "two"),
    "class of the model": (lambda _: align_labels(two(), ("one", "twoo")), "twoo"),
    "kind of a request": (lambda _: resolve("clas:3", digits()), "class"),
    "ranking": (lambda _: score_of("hardest:3,confidance"), "confidence"),
    "recipe": (lambda _: read_recipe("cifar10-resnet18/salum"), "cifar10-resnet18/salun"),
    "key of a recipe": (lambda folder: recipe(folder, "reslt=1"), "result"),
    "status of a recipe": (lambda folder: recipe(folder, "status=publishd"), "published"),
    "section of a job": (job, "evaluate"),
    "range": (lambda _: choose_ranges("alhpa=1:2", METHODS["ssd"]()), "alpha"),
    "role": (lambda _: prepare([{"name": "a", "role": "originl"}]), "original"),
    "module": (lambda _: taps(), "net.conv3"),
    "fact of a metric": (lambda _: wrong_metric(titel="a"), "title"),
    "unit of a metric": (lambda _: wrong_metric(unit="scroe"), "score"),
    "need of a metric": (lambda _: wrong_metric(needs=("orignal",)), "original"),
}  # fmt: skip
"""Each closed set of names: how one of it is mistyped, and what was meant."""


def two() -> Data:
    """A set with the classes one and two."""
    from letheon.loaders.datasets.image_set import ArrayImages

    images = ArrayImages("two", np.zeros((2, 2, 2, 3), np.uint8), np.array([0, 1]), ("one", "two"))
    return Data(images, images, (("one",), ("two",)))


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_name_is_suggested(case: str, tmp_path: Path) -> None:
    call, meant = CASES[case]
    if "timm" in case:
        pytest.importorskip("timm")
    with pytest.raises(InputError) as caught:
        call(tmp_path)
    text = str(caught.value)
    assert f"did you mean {meant}" in text and "\n" not in text
    assert text.count("did you mean") == 1


def test_a_command_is_suggested(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    from letheon.launch import main

    monkeypatch.setattr("sys.argv", ["letheon", "evalaute"])
    with pytest.raises(SystemExit):
        main.main()
    ended = scripts("methods", "scub")
    assert ended.code == 2 and "did you mean scrub" in ended.err


def test_an_option_of_another_method_is_named_as_such() -> None:
    with pytest.raises(InputError, match="it is an option of salun, salun-soft"):
        forget.read([*RUN, "finetune", "--density", "0.5"])


def test_an_option_of_a_method_stands_anywhere() -> None:
    """Also before its name, before the method that it wraps, and in front of a +."""
    usual = [*RUN, "salun", "--density", "0.3", "random-label", "--epochs", "2", "--order", "mixed"]
    [expected] = forget.read(usual)
    assert isinstance(expected.method, SalUn)
    assert expected.method.density == 0.3 and expected.method.inner.recipe.epochs == 2
    for words in (
        "--epochs 2 --order mixed --density 0.3 {run} salun random-label",
        "{run} salun --epochs 2 --order=mixed random-label --density 0.3",
        "--density 0.3 salun --order mixed random-label --epochs 2 {run}",
        "salun random-label {run} --order mixed --density 0.3 --epochs 2",
    ):
        assert forget.read(words.format(run=" ".join(RUN)).split()) == [expected], words
    both = forget.read(["--epochs", "3", *RUN, "finetune", "+", "spkd", "--lr", "0.1,0.2"])
    assert [one.method.recipe.epochs for one in both] == [3, 3, 3]
    for way in (["--rewind", *RUN, "scrub"], [*RUN, "--rewind", "scrub"]):
        assert forget.read(way) == forget.read([*RUN, "scrub", "--rewind"])


def test_an_option_without_its_method_says_what_is_missing() -> None:
    with pytest.raises(InputError, match="option of .* and others; no method is named$"):
        forget.read([*RUN, "--epochs", "2"])
    with pytest.raises(InputError, match="option of .* and others; salun wraps no method yet$"):
        forget.read([*RUN, "salun", "--epochs", "2"])


def test_a_word_too_many_is_named() -> None:
    for words in (("finetune", "spkd"), ("finetune", "--lr", "0.1", "spkd")):
        with pytest.raises(InputError, match=r"^got spkd beside finetune; .* or a \+ between two$"):
            forget.read([*RUN, *words])
    for settings, *words in (
        (train.Settings, "--data", "digits", "--out", "a", "more"),
        (evaluate.Settings, "runs", "more", "--seed", "1"),
    ):
        with pytest.raises(InputError, match="^got more, which no option takes; expected --OPTION"):
            parse(settings, words)
    with pytest.raises(InputError, match="^got 'tcsh'; expected one of bash, zsh, fish$") as found:
        parse(completion.Settings, ["tcsh"])
    assert not found.value.option  # it has no dashes


def test_a_mistyped_method_is_blamed_before_its_options() -> None:
    for words, meant in (
        (("finetun", "--lr", "0.1"), "got method 'finetun'.*did you mean finetune"),
        (("salun", "random-lable", "--lr", "3"), "'random-lable'.*did you mean random-label"),
        # What stands behind an option that there is not may be its value.
        (("--lrr", "0.1", "finetune"), "got --lrr"),
    ):
        with pytest.raises(InputError, match=meant):
            forget.read([*RUN, *words])
    with pytest.raises(InputError, match="'finetun'.*did you mean finetune"):
        parse(forget.Settings, ["--mean", "0.5", "0.5", "0.5", "finetun", "-h"])


def test_a_method_is_no_option_and_what_is_far_is_not_suggested() -> None:
    for typo in ("--mehtod", "--method", "--methd"):
        with pytest.raises(InputError, match="the method is a bare word.*such as finetune$"):
            forget.read([*RUN, typo, "salun"])
    with pytest.raises(InputError, match="did you mean --model"):
        forget.read([*RUN, "--modle", "small", "salun"])
    for far in (["train", "--out", "a", "--betas", "1"], ["forget", *RUN, "kd", "--betas", "1"]):
        with pytest.raises(InputError) as caught:
            parse({"train": train, "forget": forget}[far[0]].Settings, far[1:])  # type: ignore[attr-defined]
        assert "did you mean" not in str(caught.value)


def test_every_word_that_is_right_passes() -> None:
    """Methods after options of any number of values, and values that look like methods."""
    words = ["--mean", "0.5", "0.5", "0.5", "--out=kd", "--overwrite", *RUN[:4]]
    [settings] = forget.read([*words, "salun", "--leak", "negmerge", "--rates", "0.5", "1", "2"])
    assert settings.method.name == "salun" and settings.out == Path("kd")
    for name in ("dual-optim", "weight-distance"):
        refuse_unknown(forget.Settings, [*RUN, name, *["random-label"] * (name == "dual-optim")])


def test_no_setting_of_a_method_has_the_name_of_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tune` could not search `esc` and `spotter`, whose `share` was an option of its own."""
    for name, method in METHODS.items():
        for settings in (forget.Settings, tune.Settings):
            words = [*RUN, name, *["random-label"] * bool(inner_fields(method))]
            refuse_unknown(settings, words)

    @dataclass(frozen=True, kw_only=True)
    class Clash(Finetune):
        device: int = 1

    monkeypatch.setitem(METHODS, "clash", Clash)
    with pytest.raises(InputError, match="'device' is an option of the command too"):
        forget.read([*RUN, "clash"])
