"""Nodes that differ are found before anything is written; a rank that fails alone says why."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.recipe import Recipe
from letheon.engine.runs import agreement, run_folder
from letheon.errors import InputError, LetheonError
from letheon.launch import doctor
from letheon.launch.api import plan_forgetting
from letheon.launch.command import together
from letheon.launch.inputs import Call
from letheon.loaders.datasets.image_set import ArrayImages, Data
from letheon.loaders.forget_request import resolve
from letheon.loaders.shared_work import share_work
from letheon.methods.finetune import Finetune
from letheon.methods.grad_ascent import GradAscent
from tests.launch_tools import torchrun
from tests.pool import on_ranks
from tests.test_bad_input import images as pictures
from tests.world import images, network

RECIPE = Recipe(epochs=1, lr=0.01, batch_size=8)


def start(ranks: Ranks, fault: str) -> str:
    """The refusal on this rank, where the last rank has a fault; "" where all agree."""
    bad = ranks.rank == ranks.world - 1
    ranks = replace(ranks, local_rank=0)  # each a node of its own
    train = images()
    request, seed, method = "class:2", 1, Finetune(RECIPE)
    model = network()
    model.class_names = train.classes
    if bad and fault == "forget request":
        request = "class:1"
    elif bad and fault == "seed":
        seed = 2
    elif bad and fault == "method ":
        method = GradAscent(RECIPE)  # type: ignore[assignment]
    elif bad and fault == "method.recipe.lr":
        method = Finetune(replace(RECIPE, lr=0.02))
    elif bad and fault == "train images":
        pixels = train.pixels.copy()
        pixels[7, 0, 0, 0] ^= 1
        train = ArrayImages("noise", pixels, train.labels, train.classes)
    elif bad and fault == "labels and class names":
        train = ArrayImages("noise", train.pixels, train.labels[::-1].copy(), train.classes)
    elif bad and fault == "weights":
        with torch.no_grad():
            next(model.parameters()).flatten()[0] += 1
    elif bad and fault == "code":
        vars(agreement)["code_digest"] = lambda: "0" * 64
    elif bad and fault == "version of torch":
        agreement._versions, kept = lambda: {"version of torch": "1.0"}, agreement._versions

    def plan() -> object:
        if bad and fault == "on ":
            raise InputError("got no image", option="data")
        data = Data(train, train, tuple((name,) for name in train.classes))
        call = Call(data=f"/node{ranks.rank}", seed=seed, method=method, workers=ranks.rank)
        return plan_forgetting(call, method, model, data, resolve(request, data), ranks)

    try:
        together(ranks, plan, lambda one: agreement.plan_facts(*one))  # type: ignore[misc]
    except LetheonError as error:
        assert error.everywhere and isinstance(error, InputError)
        return str(error)
    finally:
        if bad and fault == "code":
            vars(agreement)["code_digest"] = run_folder.code_digest
        elif bad and fault == "version of torch":
            agreement._versions = kept
    (node,) = ranks.nodes
    assert node["ranks"] == list(range(ranks.world)) and node["host"] == socket.gethostname()
    return ""


def start_each(ranks: Ranks, faults: list[str]) -> list[str]:
    return [start(ranks, fault) for fault in faults]


def test_what_differs_on_one_node_is_named_on_all() -> None:
    faults = [
        "forget request", "seed", "method ", "method.recipe.lr", "train images",
        "labels and class names", "weights", "code", "version of torch", "on ",
    ]  # fmt: skip
    results = on_ranks(3, start_each, ["", *faults])
    assert results[0] == results[1] == results[2]
    equal, *texts = results[0]
    assert equal == ""  # places and workers differ
    host = socket.gethostname()
    for fault, text in zip(faults, texts, strict=True):
        assert text.startswith(f"got {fault}" if fault != "on " else "on "), text
        assert f"{host} (rank 2)" in text and "\n" not in text
        assert fault == "on " or f"{host} (rank 0)" in text


def start_on_gpus(ranks: Ranks, cards: list[str]) -> tuple[str, str]:
    """The refusal of a start, and what the doctor finds, where each rank is on its card."""
    card = SimpleNamespace(
        name="a GPU", total_memory=2**30, major=9, minor=0, uuid=cards[ranks.rank]
    )  # fmt: skip
    on_gpu = replace(ranks, device=torch.device("cuda", 0))
    refusal = ""
    with (
        mock.patch("torch.cuda.get_device_properties", return_value=card),
        mock.patch("torch.cuda.nccl.version", return_value=(2, 30)),
    ):
        try:
            together(on_gpu, lambda: None)
        except InputError as error:
            assert error.everywhere
            refusal = str(error)
        lines = list(doctor._devices(doctor.Settings(), on_gpu))
    return refusal, "".join(line.text for line in lines if line.status == "failure")


def start_on_each(ranks: Ranks, cases: list[list[str]]) -> list[tuple[str, str]]:
    return [start_on_gpus(ranks, cards) for cards in cases]


def test_two_ranks_on_one_gpu_are_refused_on_all_whatever_the_launcher_says() -> None:
    for own in on_ranks(3, start_on_each, [["a", "b", "c"], ["a", "b", "a"]]):
        apart, shared = own
        assert apart == ("", "")
        place = f"ranks 0, 2 on one GPU ({socket.gethostname()} a)"
        assert shared[1] == place
        assert shared[0].startswith(f"got {place}; expected one rank a GPU; start fewer")


def work(ranks: Ranks, fault: str) -> tuple[str, list[int], int]:
    """Before a start: the squares of ten numbers; the last rank is elsewhere or fails."""
    own: list[int] = []

    def compute(number: int) -> int:
        own.append(number)
        if fault == "item" and number == 8:
            raise InputError("got eight")
        return number * number

    def plan() -> list[int]:
        if fault and ranks.rank == ranks.world - 1:
            if fault == "before":
                raise InputError("got no image")
            if fault == "none":
                return []
        return share_work("squares", range(10), compute)

    try:
        return "", together(ranks, plan), len(own)
    except InputError as error:
        return str(error), [], len(own)


def work_each(ranks: Ranks, faults: list[str]) -> list[tuple[str, list[int], int]]:
    return [work(ranks, fault) for fault in faults]


def test_work_before_a_start_is_shared_out_and_no_rank_waits_for_one_that_is_elsewhere() -> None:
    results = on_ranks(3, work_each, ["", "before", "none", "item", ""])
    host = socket.gethostname()
    for rank, (shared, before, none, item, again) in enumerate(results):
        assert shared == again == ("", [n * n for n in range(10)], 4 if rank == 0 else 3)
        assert before[0] == f"on {host} (rank 2): got no image"
        assert none[0].startswith(f"got stage start on {host} (rank 2) and squares (10 parts) on ")
        assert item[0] == "got eight"


def test_the_digest_of_the_code_is_over_every_source_file(tmp_path: Path) -> None:
    for folder in ("engine", "eval"):
        (tmp_path / folder).mkdir()
    digests = set()
    for name, text in (("engine/a.py", "1"), ("engine/a.py", "2"), ("eval/b.py", "2")):
        (tmp_path / name).write_text(text)
        digests.add(run_folder._digest_sources(tmp_path))
    (tmp_path / "engine" / "notes.txt").write_text("no code")
    assert len(digests) == 3 and run_folder._digest_sources(tmp_path) in digests


@pytest.mark.slow
def test_a_rank_that_fails_in_the_loop_names_itself_and_the_file(tmp_path: Path) -> None:
    """The one broken file is read by whichever rank has it; its reason is printed once."""
    root = pictures(tmp_path / "set", each=4)
    train = ("train", "--data", root, "--device", "cpu", "--epochs", "1", "--batch-size", "8")
    broken = root / "train" / "4" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    said = set()
    for seed in (1, 2, 3, 4):
        ended = torchrun(2, *train, "--seed", seed, "--out", tmp_path / f"out{seed}")  # type: ignore[arg-type]
        assert ended.code != 0
        lines = [line for line in ended.err.splitlines() if line.startswith("error: on ")]
        assert len(lines) == 1 and "4/1.png" in lines[0], ended.err
        said.add(lines[0].partition("(rank ")[2][0])
        if len(said) == 2:
            break
    assert said == {"0", "1"}
