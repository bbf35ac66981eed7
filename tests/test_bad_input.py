"""Bad input: one line with what was got, exit code 2, nothing written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from letheon.engine.distributed import Ranks
from letheon.engine.runs.origin import _mend
from letheon.errors import InputError
from letheon.launch.command import error_line
from tests.launch_tools import Scripts, script_on, torchrun
from tests.pool import on_ranks

FINETUNE = ("finetune", "--epochs", "1")
OTHER_LIST = "543\n407\n"


def images(folder: Path, classes: int = 10, each: int = 2, parts: str = "train test") -> Path:
    """A folder of digits-like classes "0", "1", ..."""
    for part in parts.split():
        for c in range(classes):
            (folder / part / str(c)).mkdir(parents=True)
            for i in range(each):
                pixels = np.full((16, 16, 3), 20 * c, np.uint8)
                Image.fromarray(pixels).save(folder / part / str(c) / f"{i}.png")
    return folder


# case: (what the message says, the request, further options, the method and its options)
BAD: dict[str, tuple[str, str, str, str]] = {
    "unknown class": ("unknown class 'eleven'", "class:eleven", "", "finetune"),
    "empty forget set": ("expected one of", "class:", "", "finetune"),
    "empty list": ("names no class", "file:{tmp}/empty.txt", "", "finetune"),
    "all classes": ("all 10 classes", "random:10", "", "finetune"),
    "another set's list": ("list of another dataset", "file:{tmp}/other.txt", "", "finetune"),
    "missing list": ("cannot be read", "file:{tmp}/nowhere.txt", "", "finetune"),
    "another architecture": ("expected resnet18", "class:3", "--model resnet18", "finetune"),
    "missing folder": ("does not exist", "class:3", "--data {tmp}/nowhere", "finetune"),
    "empty class folder": ("without images", "class:3", "--data {tmp}/hole", "finetune"),
    "other classes": ("does not know", "class:0", "--data {tmp}/eleven", "finetune"),
    "density": ("density", "class:3", "", "salun --density 1.5 random-label"),
    "density of no weight": (
        "--density: got density 1e-09, which is none of",
        "class:3",
        "",
        "salun --density 1e-9 random-label",
    ),
    "rate": ("lr", "class:3", "", "finetune --lr -1"),
    "top without a set": ("--downstream: got", "top:2", "", "finetune"),
    "missing mask": ("--mask: got", "class:3", "", "salun --mask {tmp}/no random-label"),
    "no such device": ("--device: got device cuda", "class:3", "--device cuda", "finetune"),
    "number format": (
        "--dtype: got dtype fp16",
        "class:3",
        "--device cpu --dtype fp16",
        "finetune",
    ),
    "momentum": ("momentum", "class:3", "", "finetune --momentum 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_exit_code_2(
    case: str, scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "other.txt").write_text(OTHER_LIST)
    images(tmp_path / "eleven", classes=11)
    images(tmp_path / "hole")
    shutil.rmtree(tmp_path / "hole" / "train" / "4")
    (tmp_path / "hole" / "train" / "4").mkdir()
    expected, request, options, method = BAD[case]
    out = tmp_path / "out"
    line = f"--forget {request} {options} {method}".format(tmp=tmp_path)
    ended = scripts("forget", "--weights", original, "--out", out, *line.split())
    assert ended.code == 2, ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert ended.err.startswith("error: ") and expected in ended.err
    assert not out.exists()


def test_checkpoint_that_is_none(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 not weights")
    for weights in (tmp_path / "nowhere", tmp_path / "torn.pth"):
        ended = scripts(
            "forget", "--weights", weights, "--model", "small", "--forget", "class:3",
            "--out", tmp_path / "out", *FINETUNE,
        )  # fmt: skip
        assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_a_run_is_only_overwritten_on_request(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    args = ("--weights", original, "--forget", "class:3", "--out", tmp_path / "run")
    assert scripts("forget", *args, *FINETUNE).code == 0
    before = (tmp_path / "run" / "weights.safetensors").read_bytes()
    again = scripts("forget", *args, *FINETUNE)
    assert again.code == 0 and "already done" in again.err
    ended = scripts("forget", *args, "--seed", "2", *FINETUNE)
    assert ended.code == 2 and "--out: got" in ended.err and "overwrite" in ended.err
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == before
    assert scripts("forget", *args, "--overwrite", "--seed", "2", *FINETUNE).code == 0
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() != before


def test_unwritable_output(scripts: Scripts, original: Path) -> None:
    ended = scripts(
        "forget", "--weights", original, "--forget", "class:3", "--out", "/proc/run", *FINETUNE
    )
    assert ended.code == 2 and "cannot be written" in ended.err


def test_a_loss_that_diverges_ends_with_3(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    ended = scripts(
        "forget", "--weights", original, "--forget", "class:3", "--out", tmp_path / "out",
        "grad-ascent", "--lr", "1e20", "--epochs", "3",
    )  # fmt: skip
    assert ended.code == 3 and "lower lr" in ended.err
    assert not (tmp_path / "out" / "weights.safetensors").exists()


def test_a_network_that_diverges_leaves_its_last_finite_weights(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    """Those of a run that ends there."""
    args = ("--weights", original, "--forget", "class:3")
    climb = ("grad-ascent", "--lr", "0.3", "--epochs")
    ended = scripts("forget", *args, "--out", tmp_path / "wild", *climb, "40")
    assert ended.code == 3 and (said := re.search(r"at the end of epoch (\d+)", ended.err))
    assert f"epoch {int(said[1]) + 1}" in ended.err
    assert scripts("forget", *args, "--out", tmp_path / "tame", *climb, int(said[1]) + 1).code == 0
    kept = load_file(tmp_path / "wild" / "last-finite.safetensors")
    assert all(
        torch.equal(kept[key], value)
        for key, value in load_file(tmp_path / "tame" / "weights.safetensors").items()
    )
    assert all(value.isfinite().all() for value in kept.values())


def test_runs_of_different_requests_are_not_compared(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    for name in ("3", "4"):
        scripts(
            "forget", "--weights", original, "--forget", f"class:{name}",
            "--out", tmp_path / name, *FINETUNE,
        )  # fmt: skip
    ended = scripts("evaluate", "--original", original, "--runs", tmp_path / "3", tmp_path / "4")
    assert ended.code == 2 and "runs of one request" in ended.err
    (tmp_path / "3" / "run.json").unlink()
    ended = scripts("evaluate", "--original", original, "--runs", tmp_path / "3")
    assert ended.code == 2 and "unfinished" in ended.err


def test_a_changed_weights_file_is_found(scripts: Scripts, original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "copy")
    file = tmp_path / "copy" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    ended = scripts("evaluate", "--original", tmp_path / "copy", "--forget", "class:3")
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (("train", "--data", "/no/set"), "data"),
        (("forget", "--weights", "/no/run", "--forget", "class:3", "finetune"), "weights"),
        (("forget", "--weights", "ORIGINAL", "--forget", "class:99", "finetune"), "forget"),
        (("forget", "--weights", "ORIGINAL", "--forget", "class:", "finetune"), "forget"),
        (("evaluate", "--original", "/no/run", "--forget", "class:3"), "original"),
        (("evaluate", "--original", "ORIGINAL", "--retrained", "/no/run"), "retrained"),
        (("evaluate", "--original", "ORIGINAL", "--runs", "/no/run"), "runs"),
        (("evaluate", "--original", "ORIGINAL", "--forget", "class:9,eleven"), "forget"),
        (("evaluate", "--original", "ORIGINAL", "--forget", "class:3", "--downstream", "/no/set"),
         "downstream"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_with_its_option(
    args: tuple[str, ...], option: str, original: Path, scripts: Scripts, tmp_path: Path
) -> None:
    words = [str(original) if word == "ORIGINAL" else word for word in args]
    ended = scripts(*words, "--out", tmp_path / "out")
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1
    assert ended.err.startswith(f"error: --{option}: got "), ended.err
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_of_other_code_is_told_how_to_begin_anew() -> None:
    """As after `git pull`; a finished run is not to be removed on a hint."""
    code, other = "code 1a before, 2b now", "settings.lr 0.1 before, 0.2 now"
    text = _mend([code], False, Path("runs/my run"))
    assert "version of the code" in text and "rm -r 'runs/my run'" in text
    assert "rm -r" not in _mend([code], True, Path("runs/a"))
    assert _mend([code, other], False, Path("runs/a")) == "give what it was begun with"


STOPS = [
    (("--forget", "class:eleven", "finetune"), "unknown class 'eleven'"),
    (("--forget", "class:3", "finetune", "--batch-size", "1"), "got 2 processes"),
]


def refusal_on(ranks: Ranks, *args: object) -> tuple[str, bool]:
    """What a rank is told, and whether all are: then the first alone says it."""
    with pytest.raises(InputError) as caught:
        script_on(ranks, "forget", *args)
    return error_line(caught.value), caught.value.everywhere


def test_every_rank_stops(original: Path, tmp_path: Path) -> None:
    for args, expected in STOPS:
        given = ("--weights", original, "--out", tmp_path / "out", *args)
        (line, everywhere), other = on_ranks(2, refusal_on, *given)
        assert expected in line and everywhere and other == (line, everywhere)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("args", "expected"), STOPS)
def test_torchrun_ends_with_the_line(
    args: tuple[str, ...], expected: str, original: Path, tmp_path: Path
) -> None:
    ended = torchrun(2, "forget", "--weights", original, "--out", tmp_path / "out", *args)
    assert ended.code != 0
    told = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and expected in told[0]
    closing = "\n".join(ended.err.rstrip().splitlines()[-15:])  # what torchrun says at its end
    assert "exitcode  : 2" in closing and told[0] in closing
    assert "To enable traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_an_option_given_twice_is_refused(scripts: Scripts, tmp_path: Path) -> None:
    ended = scripts("forget", "--forget", "class:1", "--forget=class:2", "--out", tmp_path / "x")
    assert ended.code == 2 and "got --forget 2 times; expected it once" in ended.err
    ended = scripts("train", "--batch-size", "8", "--batch_size", "9", "--out", tmp_path / "x")
    assert ended.code == 2 and "got --batch-size 2 times" in ended.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("variable", "launcher"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec")],
)
def test_processes_that_are_not_told_apart_are_refused(
    variable: str, launcher: str, scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "2")
    ended = scripts("train", "--out", tmp_path / "x")
    assert ended.code == 2 and f"got 2 processes of {launcher}" in ended.err
    assert "torchrun" in ended.err and not (tmp_path / "x").exists()


def test_a_mask_of_another_request_is_refused(
    scripts: Scripts, original: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "masks.safetensors"
    args = ("--weights", original, "--data", "digits")
    for odd, why in ((1e-9, "none of"), (0, "0 < density <= 1"), (1.5, "0 < density <= 1")):
        line = ("--forget", "class:3", "--densities", 0.5, odd, "--out", mask)
        ended = scripts("mask", *args, *line)
        assert ended.code == 2 and "--densities: got density" in ended.err and why in ended.err
        assert not mask.exists()
    ended = scripts("mask", *args, "--forget", "class:3", "--densities", 0.5, "--out", mask)
    assert ended.code == 0, ended.err
    salun = ("--out", tmp_path / "x", "salun", "--mask", mask, "random-label", "--epochs", 1)
    ended = scripts("forget", *args, "--forget", "class:8", *salun)
    assert ended.code == 2 and "made for another request" in ended.err
    assert not (tmp_path / "x").exists()
    assert scripts("forget", *args, "--forget", "class:3", *salun).code == 0


def test_a_held_out_image_that_is_gone_is_found_before_training(
    scripts: Scripts, tmp_path: Path
) -> None:
    data = images(tmp_path / "data")
    held_out = sorted((data / "test").rglob("*.png"))[0]
    held_out.unlink()
    held_out.symlink_to(tmp_path / "nowhere.png")
    ended = scripts("train", "--data", data, "--epochs", 1, "--out", tmp_path / "x")
    assert ended.code == 2 and held_out.name in ended.err
    assert not (tmp_path / "x").exists()
