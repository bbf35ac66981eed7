"""The line `next` of a command's end: what it prints is run by a shell as it stands."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from letheon.folders import free_path, new_folder
from letheon.launch import evaluate
from letheon.launch.command import parse
from letheon.launch.console.following import changed_options, command_line
from letheon.loaders.datasets.image_set import ArrayImages, Data
from letheon.loaders.forget_request import name_first_class, resolve
from tests.launch_tools import ROOT, Ended, Scripts
from tests.patience import PATIENCE


class Shell:
    """A shell in which `letheon` and Python write down their words, which are then run here."""

    def __init__(self, scripts: Scripts, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scripts, self.folder = scripts, folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        python = Path(sys.executable)
        monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
        for name in ("letheon", python.name):
            file = self.bin / name
            file.write_text(
                f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
            )
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.chdir(folder)

    def __call__(self, line: str, *more: str) -> Ended:
        """Let `sh` read a line, and run what it makes of it; `more` are options of small runs."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        said = subprocess.run(
            ["sh", "-c", line], capture_output=True, text=True, check=True, timeout=PATIENCE,
            env={**os.environ, "PATH": path},
        )  # fmt: skip
        name, *words = json.loads(said.stdout)
        ended = self.scripts(Path(name).stem, *words, *more)
        assert ended.code == 0, (line, ended.err)
        return ended


@pytest.fixture
def shell(scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    folder = tmp_path / "my runs, and 'more'"
    folder.mkdir()
    return Shell(scripts, folder, monkeypatch)


@pytest.fixture
def trained(shell: Shell, scripts: Scripts) -> list[object]:
    """The options of a command on a small set, and on a network that was trained on it."""
    write_images(shell.folder / "my images", ["a", "b", "c"])
    data = ["--data", "my images"]
    assert scripts("train", *data, *SMALL, "--out", "original").code == 0
    return [*data, "--weights", "original"]


def next_of(ended: Ended) -> str:
    """The line `next` that a command printed."""
    assert ended.code == 0, ended.err
    [line] = [one for one in ended.out.splitlines() if one.startswith("  next  ")]
    return line.removeprefix("  next  ")


FAST = ("--epochs", "1", "--batch-size", "8")
SMALL = ("--epochs", "2", "--batch-size", "8", "--lr", "0.1")


@pytest.mark.slow
def test_every_next_line_runs_in_a_shell_and_runs_again(shell: Shell, scripts: Scripts) -> None:
    """Train, forget, evaluate and the page, in a folder with spaces; the second time it is full."""
    write_images(shell.folder / "my images", ["a", "b", "c"])
    train_again = ("train", "--data", "my images", *SMALL, "--out", "run s/original")
    trained = scripts(*train_again)
    for turn in ("", "-2"):
        forgot = shell(next_of(trained), *FAST)
        assert (shell.folder / f"run s/salun{turn}/weights.safetensors").is_file()
        shell(next_of(forgot))
        assert (shell.folder / f"run s/table{turn}/evaluation.json").is_file()
        trained = scripts(*train_again)
    measure_again = ("evaluate", "run s", "--data", "my images", "--random-control")
    measured = scripts(*measure_again)
    for turn in ("-3", "-4"):
        page = shell(next_of(measured))
        assert "\nrandom " in page.out and page.out.endswith("report.html\n")
        assert (shell.folder / f"run s/table{turn}/report.html").is_file()
        measured = scripts(*measure_again)


@pytest.mark.slow
def test_a_prepared_set_of_classes_with_commas_is_trained_and_forgets(
    shell: Shell, scripts: Scripts
) -> None:
    write_images(shell.folder / "my images", ["Grey, wolf's", "owl", "tench, Tinca tinca"])
    prepare = ("prepare", "--source", "my images", "--out", "a set", "--workers", "0")
    line = next_of(scripts(*prepare))
    trained = shell(line, *SMALL)
    forgot = shell(next_of(trained), *FAST)
    assert "forgot class:Grey, wolf's, 4 of 12 images" in forgot.out
    shell(next_of(forgot))
    shutil.rmtree(shell.folder / "a set")
    again = next_of(scripts(*prepare))
    assert again == line.replace("runs/original", "runs/original-2")
    shell(again, *SMALL)


def test_domains_are_not_to_be_trained_on(shell: Shell, scripts: Scripts) -> None:
    for domain in ("art", "photo"):
        write_images(shell.folder / "domains" / domain, ["owl", "wolf"], parts=("",))
    ended = scripts("prepare", "--source", "domains", "--out", "set", "--workers", "0")
    assert ended.code == 0 and "  next  " not in ended.out


def test_a_mask_is_used_at_a_density_it_holds_for_the_request_it_was_made_of(
    shell: Shell, scripts: Scripts, trained: list[object]
) -> None:
    words = ("mask", *trained, "--forget", "random:2", "--seed", "5", "--densities")
    for densities, told in (((0.3, 0.8), " --density 0.3"), ((0.1, 0.5), "")):
        out = shell.folder / f"of {densities}.safetensors"
        line = next_of(scripts(*words, *densities, "--out", out))
        assert line.endswith(f"safetensors'{told} random-label")
        assert "forgot random:2" in shell(line, *FAST).out


def test_runs_of_two_requests_are_told_apart(
    shell: Shell, scripts: Scripts, trained: list[object]
) -> None:
    jobs = ("class:a finetune", "class:b finetune", "class:a retrain")
    Path("jobs").write_text("\n".join(f"--forget {job} --epochs 1" for job in jobs))
    ended = scripts("forget", *trained, "--jobs", "jobs", "--out", "all runs/of it")
    assert ended.out.startswith(
        "finetune-classa, finetune-classb, retrain-classa: "
        "forgot class:a, 4 of 12 images; class:b, 4 of 12 images, "
    )
    line = next_of(ended)
    assert [path.name for path in map(Path, shlex.split(line)) if path.parent.name == "of it"] == [
        "retrain-classa", "finetune-classa"
    ]  # fmt: skip
    shell(line)


def test_a_name_is_free_where_nothing_lies_or_is_on_its_way(tmp_path: Path) -> None:
    wish = tmp_path / "a run"
    assert free_path(wish) == wish
    for count, taken in enumerate((wish, new_folder(tmp_path / "a run-2")), start=2):
        taken.mkdir()
        assert free_path(wish) == tmp_path / f"a run-{count}"
    (tmp_path / "a run-3").symlink_to("nowhere")
    assert free_path(wish) == tmp_path / "a run-4"


@pytest.mark.parametrize(
    ("classes", "labels", "name"),
    [
        (("owl", "wolf"), (0, 1), "owl"),
        (("owl", "wolf", "fox"), (1, 2), "wolf"),  # no image shows the first
        (("owl", "wolf"), (1, 1), None),  # and nothing would be left
        (("1", "0"), (0, 1), "id=0"),
        (("a, b", "a", "b"), (0, 1, 2), "id=0"),
        (("two\nlines", "b"), (0, 1), "id=0"),
        (("grey, wolf", "b"), (0, 1), "grey, wolf"),
    ],
)
def test_a_class_is_named_so_that_it_is_understood(
    classes: tuple[str, ...], labels: tuple[int, ...], name: str | None
) -> None:
    pixels = np.zeros((len(labels), 2, 2, 3), np.uint8)
    images = ArrayImages("images", pixels, np.array(labels), classes)
    data = Data(images, images, tuple((one,) for one in classes))
    assert name_first_class(data) == name
    if name is not None:
        assert resolve(f"class:{name}", data).classes == (labels[0],)


def test_options_come_back_from_what_is_written() -> None:
    words = [
        "runs", "--data", "a b", "--holdout", "0.1", "--workers", "0", "--device", "cpu",
        "--mean", "0", "-1", "0.5", "--random-control", "--depth", "full", "--runs", "c d", "e",
        "--forget", "class:-1", "--seed", "-3",
    ]  # fmt: skip
    said = parse(evaluate.Settings, words)
    names = [one.name for one in dataclasses.fields(said) if one.name != "folder"]
    again = ["runs", *map(str, changed_options(said, names))]
    assert parse(evaluate.Settings, again) == said
    assert [*changed_options(evaluate.Settings(), names)] == []


def test_a_command_is_written_as_this_one_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of another folder than the command's; a path that looks like an option."""
    monkeypatch.chdir(ROOT)
    place = Path(sys.executable).parent
    for path, python in ((place, Path(sys.executable).name), (ROOT / "docs", sys.executable)):
        monkeypatch.setenv("PATH", str(path))
        for start, command in (
            ("letheon run", "letheon evaluate"),
            ("launch/train.py", f"{python} launch/evaluate.py"),
            (str(ROOT / "launch/jobs/run.py"), f"{python} {ROOT}/launch/evaluate.py"),
        ):
            monkeypatch.setattr(sys, "argv", [start])
            assert command_line("evaluate", [Path("-a b"), "-c"]) == f"{command} './-a b' -c"


def write_images(root: Path, classes: list[str], parts: tuple[str, ...] = ("train", "val")) -> None:
    """Write 4 images of 16 pixels for each class and part, each class of a shade of its own."""
    rng = np.random.default_rng(0)
    for part in parts:
        for shade, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 30, (16, 16, 3)) + 70 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
