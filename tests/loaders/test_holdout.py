"""A share of one folder of classes held out: by names, by class, the same for everyone."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import letheon
from letheon.errors import InputError
from letheon.loaders.datasets.files import FileImages
from letheon.loaders.formats.arrays_writer import prepare
from letheon.loaders.open import open_data, open_source
from letheon.loaders.options import DataOptions
from letheon.loaders.views import SubsetImages
from letheon.methods.train import Train
from tests.launch_tools import Scripts, torchrun

Drawn = Callable[..., Path]
COUNTS = {"ant": 20, "bee": 11, "cat": 2}
PATHS = [f"{name}/{i}.png" for name, count in COUNTS.items() for i in range(count)]


def files(images: object) -> list[str]:
    assert isinstance(images, SubsetImages) and isinstance(images.images, FileImages)
    return [images.images.file(int(i)) for i in images.numbers]


def test_each_class_gives_its_share_and_nothing_is_lost(draw: Drawn) -> None:
    root = draw(PATHS)
    data = open_data(str(root), holdout=0.1)
    train, test = files(data.train), files(data.test)
    assert sorted(train + test) == sorted(PATHS) and not set(train) & set(test)
    assert np.bincount(data.test.labels).tolist() == [2, 1, 1]
    assert np.bincount(data.train.labels).tolist() == [18, 10, 1]
    assert data.classes == data.test.classes == tuple(COUNTS)
    assert data.train.digest != data.test.digest
    assert "4 of 33 images are held out (share 0.1, seed 0)" in data.notes[-1]
    half = open_data(str(root), holdout=0.5)
    assert np.bincount(half.test.labels).tolist() == [10, 6, 1]


def test_the_split_follows_from_seed_and_names_alone(draw: Drawn, tmp_path: Path) -> None:
    root = draw(PATHS)
    held = set(files(open_data(str(root), 0.3).test))
    assert set(files(open_data(str(draw(PATHS, "elsewhere")), 0.3).test)) == held
    assert set(files(open_data(str(root), 0.3, seed=1).test)) != held
    assert set(files(open_data(str(root), 0.5).test)) > held  # a larger share holds the smaller
    (root / "ant/20.png").write_bytes((root / "ant/0.png").read_bytes())
    moved = set(files(open_data(str(root), 0.3).test)) ^ held
    assert moved <= {"ant/20.png", *held} and len(moved) <= 2
    options = DataOptions(data=str(root), holdout=0.3, seed=7)  # another run, the same images
    assert options.open_data().test.digest == open_data(str(root), 0.3).test.digest


def test_an_archive_is_divided_as_its_folder(draw: Drawn, tmp_path: Path) -> None:
    root = draw(PATHS)
    held = set(files(open_data(str(root), 0.3).test))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in PATHS:
            archive.write(root / path, f"any-name-1.0/{path}")
    packed = files(open_data(str(tmp_path / "set.zip"), 0.3).test)
    assert {path.removeprefix("any-name-1.0/") for path in packed} == held
    prepare(open_source(str(tmp_path / "set.zip")), tmp_path / "list")
    assert files(open_data(str(tmp_path / "list"), 0.3).test) == packed


@pytest.mark.parametrize(
    ("paths", "count"),
    [
        ([f"train/{path}" for path in PATHS], 4),
        ([f"n0144{k}_{i}.JPEG" for k in range(1000, 1003) for i in range(5)], 3),
    ],
    ids=["train alone", "names"],
)
def test_other_sets_without_a_test_split(draw: Drawn, paths: list[str], count: int) -> None:
    data = open_data(str(draw(paths)), holdout=0.1)
    assert (len(data.train), len(data.test)) == (len(paths) - count, count)
    assert not any("test is the same as train" in note for note in data.notes)


def test_what_cannot_be_held_out_is_refused(draw: Drawn) -> None:
    for share in (-0.1, 1.0, 2.0):
        with pytest.raises(InputError, match="between 0 and 1"):
            open_data(str(draw(PATHS)), holdout=share)
    with pytest.raises(InputError, match="a share can be held out") as caught:
        open_data(str(draw(PATHS)))
    assert caught.value.option == "holdout"
    with pytest.raises(InputError, match="has a test split"):
        open_data("digits", holdout=0.1)
    with pytest.raises(InputError, match="class 'cat' of one image"):
        open_data(str(draw([*PATHS[:-1]], "one")), holdout=0.1)
    domains = [f"{domain}/{path}" for domain in ("real", "clipart") for path in PATHS[:4]]
    with pytest.raises(InputError, match=r"2 domain\(s\)"):
        open_data(str(draw([*domains, "real/x/1.png"], "two")), holdout=0.1)


def test_a_run_records_it(scripts: Scripts, draw: Drawn, tmp_path: Path) -> None:
    root = draw(PATHS, size=(16, 16))
    base = ["--data", root, "--holdout", 0.1, "--size", 16, "--model", "small", "--epochs", 1,
            "--batch-size", 8, "--device", "cpu", "--workers", 0]  # fmt: skip
    ended = scripts("train", *base, "--out", tmp_path / "a")
    assert ended.code == 0, ended.err
    assert "4 of 33 images are held out" in ended.err
    assert '"holdout": 0.1' in (tmp_path / "a" / "settings.json").read_text()
    ended = scripts("train", *base[:2], *base[4:], "--out", tmp_path / "c")
    assert ended.code == 2 and "--holdout: " in ended.err


@pytest.mark.slow
def test_two_ranks_hold_out_the_same(scripts: Scripts, draw: Drawn, tmp_path: Path) -> None:
    base = ["--data", draw(PATHS, size=(16, 16)), "--holdout", 0.1, "--size", 16,
            "--model", "small", "--epochs", 1, "--batch-size", 8, "--device", "cpu"]  # fmt: skip
    ended = scripts("train", *base, "--out", tmp_path / "a")
    assert ended.code == 0, ended.err
    ended = torchrun(2, "train", *base, "--seed", 5, "--out", tmp_path / "b")
    assert ended.code == 0, ended.err
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in "ab")
    assert one["data"] == two["data"]


def test_in_python_for_folders_and_datasets(draw: Drawn) -> None:
    method = Train(recipe=replace(Train().recipe, epochs=1, batch_size=8))
    root = draw(PATHS, size=(16, 16))
    found = letheon.train("small", train=str(root), method=method, holdout=0.1, device="cpu")
    assert found.record["data"]["test"] == open_data(str(root), 0.1).test.digest
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(images, torch.arange(40) % 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    found = letheon.train(net, train=dataset, method=method, holdout=0.25, device="cpu")
    assert sum(line.get("retain_read", 0) for line in found.metrics) == 30
    with pytest.raises(InputError, match="one of them") as caught:
        letheon.train(net, train=dataset, test=dataset, method=method, holdout=0.25, device="cpu")
    assert caught.value.option == "holdout"
