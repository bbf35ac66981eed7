"""Every command that docs/migration.md maps runs, at small size."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from letheon.launch import evaluate, forget, mask, train
from letheon.launch.command import run_command

DOC = Path(__file__).resolve().parent.parent / "docs" / "migration.md"
SCRIPTS = {"train": train, "forget": forget, "mask": mask, "evaluate": evaluate}
WNIDS = ("n01440764", "n01443537", "n02085620", "n03028079")


def folder(root: Path, splits: tuple[str, ...], classes: tuple[str, ...], each: int) -> None:
    generator = np.random.default_rng(0)
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = generator.integers(0, 120, (40, 36, 3)) + 40 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.jpg")


def commands() -> list[str]:
    return re.findall(r"```sh\n(.*?)\n```", DOC.read_text(encoding="utf-8"), re.S)


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, script, *args = line.split()
    monkeypatch.setattr(sys, "argv", [script, *args])
    module = SCRIPTS[Path(script).stem]
    try:
        run_command(module.Settings, module.main)
    except SystemExit as end:
        assert not end.code, line


@pytest.mark.slow
def test_every_mapped_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "imagenet", ("train", "val"), WNIDS, 6)
    folder(tmp_path / "office", ("Art", "Clipart", "Product", "Real World"), ("Bed", "Bike"), 5)
    (tmp_path / "random100.txt").write_text("2\n")
    (tmp_path / "runs").mkdir()
    small = [
        ("/data/imagenet", str(tmp_path / "imagenet")),
        ("/data/office-home", str(tmp_path / "office")),
        ("file:random100.txt", f"file:{tmp_path}/random100.txt"),
        ("runs/", f"{tmp_path}/runs/"),
        ("--model resnet50", "--model small --size 16 --batch-size 8"),
    ]
    for line in commands():
        for old, new in small:
            line = line.replace(old, new)
        line = re.sub(r"--epochs \d+", "--epochs 1", line).replace("--lr 0.1", "--lr 0.01")
        run(line.replace("launch/train.py", "launch/train.py --workers 0"), monkeypatch)
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    runs = {"original", "spkd", "spkd-published", "retrain", "ft", "ga", "l1", "salun"}
    runs |= {"salun-published"}
    assert made == runs | {"masks.safetensors", "table", "table-published"}
    for run_folder in runs:
        assert (tmp_path / "runs" / run_folder / "weights.safetensors").is_file()


def test_every_script_and_method_of_the_mapping_is_there() -> None:
    text = " ".join(commands())
    for word in ("train", "mask", "forget", "evaluate"):
        assert f"launch/{word}.py" in text
    for method in ("spkd", "retrain", "finetune", "grad-ascent", "l1-sparse", "salun"):
        assert f" {method} " in text
