"""Several runs from one pass over the data: each ends as it ends alone, or is named unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from letheon.engine.method import Method
from letheon.engine.models import teacher
from letheon.engine.models.classifier import Classifier
from letheon.engine.recipe import Recipe
from letheon.engine.runs import several
from letheon.launch import forget
from letheon.launch.joblist import flags_of, job_names, split
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.preset import Preset
from letheon.methods import METHODS
from letheon.methods.finetune import Finetune
from letheon.methods.random_label import RandomLabel
from letheon.methods.salun import SalUn
from letheon.methods.spkd import Spkd
from tests.launch_tools import Scripts, torchrun

REQUEST = ("--forget", "class:3,8", "--data", "digits")
# name -> the method and its options; batches of two sizes, every stream, two epochs.
RUNS: dict[str, str] = {
    "finetune": "finetune --epochs 2 --lr 0.05",
    "grad-ascent": "grad-ascent --epochs 3 --lr 1e-4",
    "salun": "salun --density 0.3 random-label --epochs 2 --lr 0.02",
    "spkd": "spkd --epochs 2 --lr 1e-4",
    "random-label": "random-label --order paired --epochs 2 --lr 0.02",
    "head-distillation": "head-distillation --epochs 1",
    "retrain": "retrain --epochs 1 --batch-size 100",
}


def joined(runs: dict[str, str]) -> list[str]:
    return " + ".join(runs.values()).split()


def digest(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["weights"])


def rows(run: Path) -> list[dict[str, object]]:
    """What happened in each phase, the clock apart."""
    clock = ("at", "seconds", "images_per_second", "compile_seconds", "together", "previous")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    phases = [line for line in lines if line["kind"] == "phase"]
    return [{k: v for k, v in phase.items() if k not in clock} for phase in phases]


def same(one: Path, other: Path) -> None:
    assert digest(one) == digest(other), one
    assert rows(one) == rows(other)
    settings = [json.loads((run / "settings.json").read_text()) for run in (one, other)]
    assert settings[0] | {"out": ""} == settings[1] | {"out": ""}
    assert (one / "request.json").read_text() == (other / "request.json").read_text()
    files = [sorted(p.name for p in run.iterdir()) for run in (one, other)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_together_is_as_alone(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    args = ("--weights", original, *REQUEST)
    ended = scripts("forget", *args, "--out", tmp_path / "all", *joined(RUNS))
    assert ended.code == 0, ended.err
    assert "7 runs" in ended.err and "all at once" in ended.err
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(RUNS)
    for name, method in RUNS.items():
        assert scripts("forget", *args, "--out", tmp_path / name, *method.split()).code == 0
        same(tmp_path / "all" / name, tmp_path / name)


def test_seeds_and_rates(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    args = ("--weights", original, "--forget", "random:2")
    method = ("finetune", "--epochs", "1", "--lr")
    ended = scripts(
        "forget", *args, "--seed", "1,2", "--out", tmp_path / "all", *method, "0.1,0.01"
    )
    assert ended.code == 0, ended.err
    names = {p.name for p in (tmp_path / "all").iterdir()}
    assert names == {f"finetune-lr{lr}-seed{s}" for lr in ("0.1", "0.01") for s in (1, 2)}
    for seed in ("1", "2"):
        alone = tmp_path / seed
        ended = scripts("forget", *args, "--seed", seed, "--out", alone, *method, "0.01")
        assert ended.code == 0, ended.err
        same(tmp_path / "all" / f"finetune-lr0.01-seed{seed}", alone)


@pytest.mark.slow
def test_a_file_of_runs_with_requests_of_their_own(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    lines = {
        "finetune-class3-seed1": "--forget class:3 finetune --epochs 1",
        "ssd-class8-seed1": "--forget class:8 ssd --alpha 2  # one-shot",
        "ssd-class8-seed2": "--forget class:8 --seed 2 ssd --alpha 2",
        "spkd-random-samples5_-seed1": "--forget random-samples:5% "
        "--recipe digits-small-classes/spkd --epochs 1",
        "random-label-hardest30-seed1": "--forget hardest:30 random-label --epochs 1",
        "random-label-easiest30_confidence-seed1": "--forget easiest:30,confidence "
        "random-label --epochs 1",
    }
    (tmp_path / "jobs.txt").write_text("# six\n\n" + "\n".join(lines.values()))
    args = ("--weights", original, "--data", "digits")
    out = tmp_path / "all"
    ended = scripts("forget", *args, "--out", out, "--jobs", tmp_path / "jobs.txt")
    assert ended.code == 0, ended.err
    assert sorted(p.name for p in out.iterdir()) == sorted(lines)
    for name, line in list(lines.items())[2:5]:
        alone = tmp_path / name
        words = line.partition("#")[0].split()
        assert scripts("forget", *args, "--out", alone, *words).code == 0
        same(out / name, alone)
    requests = {n: json.loads((out / n / "request.json").read_text())["samples"] for n in lines}
    hard, easy = (
        requests[f"random-label-{n}-seed1"] for n in ("hardest30", "easiest30_confidence")
    )
    assert len(hard) == len(easy) == 30 and not set(hard) & set(easy)
    assert len(requests["spkd-random-samples5_-seed1"]) > 50


@pytest.mark.slow
def test_two_ranks(original: Path, tmp_path: Path) -> None:
    runs = {k: v for k, v in RUNS.items() if k in ("finetune", "grad-ascent", "salun", "spkd")}
    args = ("--weights", original, *REQUEST)
    ended = torchrun(2, "forget", *args, "--out", tmp_path / "all", *joined(runs))
    assert ended.code == 0, ended.err
    for name, method in runs.items():
        ended = torchrun(2, "forget", *args, "--out", tmp_path / name, *method.split())
        assert ended.code == 0, ended.err
        same(tmp_path / "all" / name, tmp_path / name)


@pytest.mark.slow
def test_one_that_diverges_leaves_the_others(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    out = tmp_path / "all"
    args = ("--weights", original, *REQUEST, "--out", out)
    wild, short = "grad-ascent --lr 1e20 --epochs 3", "spkd --epochs 1"
    ended = scripts("forget", *args, *joined({"": RUNS["finetune"], "wild": wild}))
    assert ended.code == 3
    assert "1 of 2 runs are unfinished: grad-ascent: got a mean loss" in ended.err
    assert (out / "finetune" / "run.json").exists()
    assert not (out / "grad-ascent" / "run.json").exists()
    ended = scripts("evaluate", "--original", original, "--runs", out / "grad-ascent")
    assert ended.code == 0 and "a run that failed: " in ended.out + ended.err
    # As a single run: a failed one is refused, and replaced where that is asked for.
    ended = scripts("forget", *args, *joined({"": RUNS["finetune"], "x": "grad-ascent"}))
    assert ended.code == 2 and "a failed run" in ended.err
    ended = scripts("forget", *args, "--overwrite", *joined({"": RUNS["finetune"], "x": short}))
    assert ended.code == 0, ended.err
    assert (out / "spkd" / "run.json").exists()


def test_a_fault_of_one_leaves_the_others(
    scripts: Scripts, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from letheon.methods.grad_ascent import GradAscent

    def broken(self: object, run: object, state: object, phase: object) -> None:
        raise LookupError("nothing left")

    monkeypatch.setattr(GradAscent, "edit_grads", broken)
    args = ("--weights", original, *REQUEST, "--out", tmp_path / "all")
    with pytest.raises(RuntimeError, match="1 of 2 runs are unfinished: grad-ascent: nothing left"):
        scripts("forget", *args, *joined({"": RUNS["finetune"], "x": "grad-ascent"}))
    assert (tmp_path / "all" / "finetune" / "run.json").exists()


@pytest.mark.slow
def test_one_after_another_where_memory_is_short(
    scripts: Scripts, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "free_bytes", lambda device: 1000)
    args = ("--weights", original, *REQUEST)
    runs = {k: RUNS[k] for k in ("finetune", "spkd")}
    ended = scripts("forget", *args, "--out", tmp_path / "all", *joined(runs))
    assert ended.code == 0 and "1, then 1" in ended.err
    for name, method in runs.items():
        assert scripts("forget", *args, "--out", tmp_path / name, *method.split()).code == 0
        same(tmp_path / "all" / name, tmp_path / name)


@pytest.mark.slow
def test_what_is_shared_is_made_once(
    scripts: Scripts, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[int] = []
    plain = TorchLoader.make_batches

    def count(self: TorchLoader, parts: list, epoch: int | None, preset: Preset) -> object:  # type: ignore[type-arg]
        if epoch is not None:
            samples.append(sum(len(part.samples) for part in parts))
        return plain(self, parts, epoch, preset)

    monkeypatch.setattr(TorchLoader, "make_batches", count)
    methods = "finetune --epochs 2 + l1-sparse --epochs 2 --batch-size 64 + random-label --epochs 2"
    out = tmp_path / "all"
    args = ("--weights", original, *REQUEST, "--out", out, *methods.split(), "+", "grad-ascent")
    ended = scripts("forget", *args)
    assert ended.code == 0, ended.err
    [[everything], [kept]] = (
        {int(str(r["forget_read"])) + int(str(r["retain_read"])) for r in rows(out / run)}
        for run in ("random-label", "finetune")
    )
    # Two epochs for all four, of which the mixed pass has every image; then ascent goes on alone.
    assert samples == [everything] * 2 + [everything - kept] * 3
    facts = json.loads((out / "grad-ascent" / "run.json").read_text())
    assert facts["seconds"]["together"] == 4
    # Such a clock is no method's own.
    ended = scripts("evaluate", "--original", original, "--runs", out / "finetune",
                    "--out", tmp_path / "table")  # fmt: skip
    assert ended.code == 0, ended.err
    row = json.loads((tmp_path / "table" / "metrics.json").read_text())["rows"][1]
    assert row["seconds"] is None and "together" in row["why"]["seconds"]


def test_runs_of_one_call_have_one_teacher(
    scripts: Scripts, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Classifier] = []
    plain = teacher.frozen_copy

    def count(*args: Any) -> Classifier:
        copies.append(plain(*args))
        return copies[-1]

    monkeypatch.setattr(teacher, "frozen_copy", count)
    methods = ["kd", "--epochs", "1", "+", "rkd", "--epochs", "1"]
    args = ("--weights", original, *REQUEST, "--out", tmp_path / "all", *methods)
    assert scripts("forget", *args).code == 0
    assert len(copies) == 1


BAD: dict[str, tuple[str, str]] = {
    "nothing after +": ("got nothing where a method begins", "finetune +"),
    "nothing between": ("got nothing where a method begins", "finetune + + spkd"),
    "unknown method": ("got forgetful where a method begins", "finetune + forgetful"),
    "unknown first": ("where a method begins", "forgetful + finetune"),
    "the same twice": ("got finetune twice", "finetune --epochs 1 + finetune --epochs 1"),
    "a number twice": ("has 0.1 twice", "finetune --lr 0.1,0.10"),
    "a gap": ("a number between the commas", "finetune --lr 0.1,"),
    "a seed twice": ("has 1 twice", "--seed 1,1 finetune"),
    "other data": ("got another data", "finetune + spkd --data elsewhere"),
    "one of them wrong": ("--mask: got", "finetune + salun --mask {tmp}/none random-label"),
    "no file of runs": ("--jobs: got {tmp}/none", "--jobs {tmp}/none"),
    "a file without runs": ("without a run", "--jobs {tmp}/empty"),
    "a line that is none": ("line 1", "--jobs {tmp}/quote"),
    "an option of both": ("got --forget 2 times", "--jobs {tmp}/twice"),
    "out of range": ("density", "finetune + salun --density 0.5,1.5 random-label"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_all_before_the_start(
    case: str, scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    expected, words = BAD[case]
    out = tmp_path / "all"
    files = {"empty": "# nothing\n", "quote": "finetune --lr '1", "twice": "--forget class:4 spkd"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    args = ("--weights", original, "--forget", "class:3", "--out", out)
    ended = scripts("forget", *args, *words.format(tmp=tmp_path).split())
    assert ended.code == 2, ended.err
    assert ended.err.startswith("error: ") and expected.format(tmp=tmp_path) in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not out.exists()


def test_an_option_of_another_method(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    args = ("--weights", original, "--forget", "class:3", "--out", tmp_path / "all")
    ended = scripts("forget", *args, "finetune", "+", "grad-ascent", "--density", "0.5")
    assert ended.code == 2 and "--density" in ended.err + ended.out
    assert not (tmp_path / "all").exists()


def test_the_command_lines_of_the_single_runs() -> None:
    methods = ("finetune", "spkd", "salun", "random-label")
    flags = flags_of(forget.Settings)
    assert {"--overwrite", "--no-channels-last"} <= set(flags) and "--seed" not in flags

    def found(line: str) -> list[str]:
        own = ("--forget", "--log-every", "--seed")
        return [" ".join(words) for words in split(line.split(), methods, flags, own)]

    for single in (
        "--seed 1 --forget class:3,8 finetune --lr 0.1",
        "--data spkd --overwrite finetune",
        "--forget class:3 salun --mask a,b.safetensors random-label",
        "finetune + spkd --help",
        "--log-every 1,2 finetune",
        "finetune --log-every=1,2",
        "",
    ):
        assert found(single) == [single]
    assert found("--out finetune --seed=3,4 --overwrite spkd --lr 1e-3,2 + finetune") == [
        "--out finetune --seed=3 --overwrite spkd --lr 1e-3",
        "--out finetune --seed=3 --overwrite spkd --lr 2",
        "--out finetune --seed=4 --overwrite spkd --lr 1e-3",
        "--out finetune --seed=4 --overwrite spkd --lr 2",
        "--out finetune --seed=3 --overwrite finetune",
        "--out finetune --seed=4 --overwrite finetune",
    ]
    assert found("--lr 1,2 finetune") == ["--lr 1 finetune", "--lr 2 finetune"]


def test_a_run_is_called_after_what_tells_it_apart() -> None:
    jobs: list[tuple[int, Method, str]] = [
        (1, Finetune(Recipe(lr=0.1)), "class:3"),
        (1, Finetune(Recipe(lr=0.01)), "class:3"),
        (1, SalUn(Finetune(), density=0.1), "class:3"),
        (1, SalUn(RandomLabel(Finetune().recipe), density=0.1), "class:3"),
        (1, Spkd(), "class:3"),
    ]
    names = ["finetune-lr0.1", "finetune-lr0.01", "salun-finetune", "salun-random-label", "spkd"]
    assert job_names(jobs, METHODS) == names
    assert job_names([*jobs, (2, Spkd(), "class:3")], METHODS) == [
        *(f"{name}-seed1" for name in names),
        "spkd-seed2",
    ]
    rates = (1e9, 2.5e6, 1e6 + 1 / 7, 1.0, 3.5e-5)
    runs = [(1, Finetune(Recipe(lr=rate)), "class:3") for rate in rates]
    large = ["1e9", "2.5e6", "1000000.1428571428", "1.0", "3.5e-05"]
    assert job_names(runs, METHODS) == [f"finetune-lr{text}" for text in large]
    several = [(1, Spkd(), text) for text in ("class:3,8", "random-samples:10%", "file:a/b.txt")]
    assert job_names(several, METHODS) == ["spkd-class3_8", "spkd-random-samples10_", "spkd-fileb"]


def test_a_run_is_no_folder_of_runs(scripts: Scripts, original: Path) -> None:
    ended = scripts("forget", "--weights", original, "--forget", "class:3", "--out", original,
                    "--overwrite", "finetune", "+", "spkd")  # fmt: skip
    assert ended.code == 2 and "it is itself a run" in ended.err
