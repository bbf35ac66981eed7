"""Dry runs: the plan of 1, 4 and 512 ranks, equal to what real ranks read; nothing is written."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from letheon.engine.loop import run_method
from letheon.engine.method import Method
from letheon.engine.recipe import Recipe
from letheon.engine.runs.plan import JobOptions, Plan
from letheon.launch.planning.dry_run import (
    RunPlan,
    as_text,
    count_activations,
    plan_run,
    share_out,
)
from letheon.loaders.datasets.image_set import ArrayImages, Data
from letheon.loaders.forget_request import resolve
from letheon.methods.amun import Amun
from letheon.methods.duck import Duck
from letheon.methods.l2ul import L2ul
from letheon.methods.neg_grad_plus import NegGradPlus
from letheon.methods.random_label import RandomLabel
from letheon.methods.salun import SalUn
from letheon.methods.spkd import Spkd
from letheon.methods.spotter import Spotter
from tests.launch_tools import Scripts
from tests.pool import on_ranks
from tests.world import images, network

RECIPE = Recipe(epochs=2, lr=0.1, batch_size=9, schedule="cosine", batch_norm="frozen")
METHODS: dict[str, Method] = {
    "spkd": Spkd(RECIPE, sp_weight=1.0),
    "salun": SalUn(RandomLabel(RECIPE), density=0.5),
    "beside": NegGradPlus(RECIPE),
}


def plan_of(method: Method) -> Plan:
    data = Data(images(), images(12), tuple((name,) for name in images().classes))
    model = network()
    model.class_names = data.classes
    request = resolve("class:2", data, 0, None)
    return Plan(JobOptions(data="noise"), method.recipe, model, data, request, True)


def planned(name: str, world: int) -> RunPlan:
    return plan_run(plan_of(METHODS[name]), METHODS[name], torch.device("cpu"), world)


def read_for_real(ranks) -> dict[str, list[tuple[int, str, int, float]]]:  # type: ignore[no-untyped-def]
    """What a run on these ranks logs."""
    seen = {}
    for name, method in METHODS.items():
        lines: list[tuple[int, str, int, float]] = []

        def log(kind: str, **of) -> None:  # type: ignore[no-untyped-def]
            if kind == "phase":
                lines.append(  # noqa: B023
                    (of["epoch"], of["phase"], of["forget_read"] + of["retain_read"], of["lr"])
                )

        run_method(method, plan_of(method).run(ranks), log)
        seen[name] = lines
    return seen


def test_two_real_ranks_read_what_was_planned() -> None:
    first = on_ranks(2, read_for_real)[0]
    for name in METHODS:
        plan = planned(name, 2)
        ours = [(one.epoch, one.phase, one.images, one.last_rate) for one in plan.passes]
        assert ours == first[name]
        assert all(sum(one.rank_images) == one.images for one in plan.passes)


@pytest.mark.parametrize("world", [1, 4])
def test_plans_of_all_worlds_agree(world: int) -> None:
    one, many = planned("spkd", 1), planned("spkd", world)
    assert [p._replace(rank_images=()) for p in one.passes] == [
        p._replace(rank_images=()) for p in many.passes
    ]
    weights = sum(p.numel() for p in network().parameters())
    assert many.reduced_bytes == (4 * weights if world > 1 else 0)
    assert (
        max(many.passes[-1].rank_images) - min(many.passes[-1].rank_images)
        <= len(many.passes) * many.passes[-1].steps
    )


def test_shares_add_up_on_512_ranks() -> None:
    sizes = [1024] * 3 + [700]
    parts = share_out(sizes, 512)
    assert sum(parts) == sum(sizes) and len(parts) == 512
    assert Counter(parts) == {7: 324, 8: 188}


def test_activations_are_those_of_the_layers() -> None:
    """Convolution keeps its input, batch-norm its input, ReLU its output, pooling and linear."""
    rows, image, middle = 5, 3 * 8 * 8, 6 * 8 * 8
    least = 4 * rows * (image + 2 * middle)
    assert least <= count_activations(network(), rows) <= 2 * least
    assert count_activations(network(), 2 * rows) > 1.9 * count_activations(network(), rows)


def test_activations_are_those_of_one_micro_batch_of_a_rank() -> None:
    """A paired batch has as many forget images; `rank_batch` bounds what a rank holds at once."""
    net = network()
    assert planned("beside", 1).activation_bytes == count_activations(net, 2 * 9)
    method = RandomLabel(replace(RECIPE, batch_size=16, rank_batch=4))
    for world in (1, 2):
        plan = plan_run(plan_of(method), method, torch.device("cpu"), world)
        assert plan.activation_bytes == count_activations(net, 4)


def test_a_run_that_takes_steps_back_holds_a_copy() -> None:
    """Weights, gradient, momentum and two of the method's; again all but the gradient."""
    bytes_of = {}
    for way in ("stop", "skip"):
        method = RandomLabel(replace(RECIPE, on_nonfinite=way))
        plan = plan_run(plan_of(method), method, torch.device("cpu"), 1)
        bytes_of[way] = plan.state_bytes
    assert bytes_of["skip"] * 5 == bytes_of["stop"] * 9


def test_rows_of_forget_samples_are_shared_out() -> None:
    """10 forget samples of 3 x 8 x 8 float32; outputs are 6 features and 4 logits, also doubled."""
    image = 4 * 3 * 8 * 8
    methods: dict[Method, int] = {
        Amun(RECIPE, steps=1, doublings=0): image,
        L2ul(RECIPE, images=3, beside=1, steps=1): 3 * image,
        SalUn(Spotter(RECIPE)): image,
        Duck(RECIPE): 10 * (4 + 8),
        METHODS["spkd"]: 0,
    }
    for method, each in methods.items():
        for world, most in ((1, 10), (4, 3)):
            plan = plan_run(plan_of(method), method, torch.device("cpu"), world)
            assert plan.row_bytes == most * each
            assert ("of its share of the forget samples" in as_text(plan)) == (each > 0)
            if method.recipe.optimizer == "sgd":  # 5 times weights and buffers, as for any method
                assert plan.state_bytes == plan.row_bytes + planned("spkd", 1).state_bytes


def test_the_scripts_print_the_plan_and_write_nothing(scripts: Scripts, tmp_path: Path) -> None:
    out = tmp_path / "original"
    words = ("--data", "digits", "--epochs", "3", "--lr", "0.05", "--out", out)
    ended = scripts("train", *words, "--batch-size", "512", "--dry-run", "512")
    assert ended.code == 0, ended.err
    assert "3 steps an epoch, 1438 images (2 to 3 a rank)" in ended.out
    assert not list(tmp_path.iterdir())
    assert scripts("train", *words, "--batch-size", "64").code == 0
    before = sorted(tmp_path.rglob("*"))
    of = ("--data", "digits", "--weights", out, "--forget", "class:3", "--out", tmp_path / "x")
    ended = scripts("forget", *of, "--dry-run", "4", "salun", "random-label", "--epochs", "2")
    assert ended.code == 0, ended.err
    assert re.search(r"epoch 1 to 2, phase relabelled \(mixed\): \d+ steps", ended.out)
    ended = scripts("forget", *of, "--dry-run", "finetune", "+", "spkd")
    assert ended.code == 0 and "spkd on 1 rank:" in ended.out, ended.err
    ended = scripts("mask", *of, "--dry-run")
    assert ended.code == 0 and "mask on 1 rank:" in ended.out, ended.err
    ended = scripts("evaluate", "--data", "digits", "--original", out, "--forget", "class:3",
                    "--dry-run", "4")  # fmt: skip
    assert ended.code == 0 and "train: 1438 images (359 to 360 a rank)" in ended.out, ended.err
    size = sum(value.nbytes for value in load_file(out / "weights.safetensors").values())
    told = f"networks in memory of each rank's host, at most: {2 * size / 2**20:,.1f} MiB a rank"
    assert told in ended.out, ended.out
    assert sorted(tmp_path.rglob("*")) == before
    assert "dry_run" in json.loads((out / "settings.json").read_text())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--dry-run", "513"), "got 513 ranks to plan for"),
        (("--dry-run", "512", "--batch-size", "64"), "got 512 processes for a batch of 64 images"),
        (("--dry-run", "2", "--batch-norm", "sync"), "got batch-norm sync on cpu"),
    ],
)
def test_what_the_job_refuses_the_dry_run_refuses(
    scripts: Scripts, tmp_path: Path, extra: tuple[str, ...], message: str
) -> None:
    ended = scripts("train", "--data", "digits", "--out", tmp_path / "run", *extra)
    assert ended.code == 2 and message in ended.err
    assert not list(tmp_path.iterdir())


def test_a_set_in_the_order_of_its_classes_is_planned() -> None:
    """A method that moves samples between kept classes is no more refused here than in the run."""
    data = images(64)
    order = np.argsort(data.labels, kind="stable")
    ordered = ArrayImages("noise", data.pixels[order], data.labels[order], data.classes)
    method = Duck(RECIPE)
    plan = plan_of(method)
    plan = replace(plan, data=replace(plan.data, train=ordered))
    assert plan_run(plan, method, torch.device("cpu"), 1).passes


def test_a_plan_leaves_the_model_as_it_was() -> None:
    plan = plan_of(METHODS["salun"])
    plan_run(plan, METHODS["salun"], torch.device("cpu"), 3)
    for ours, fresh in zip(plan.model.parameters(), network().parameters(), strict=True):
        assert torch.equal(ours, fresh)
