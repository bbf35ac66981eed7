"""Ranks that come and go, and batch-norm over groups: results do not depend on their number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from letheon.engine.checkpoints import saver as saver_module
from letheon.engine.checkpoints.loop_state import Course
from letheon.engine.checkpoints.run_state import RunState
from letheon.engine.checkpoints.saver import open_saver
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.batch_norm import Groups, check_kinds
from letheon.engine.ranks.other_ranks import share_out_state
from letheon.engine.recipe import Recipe
from letheon.engine.runs.run_folder import Record
from letheon.engine.runs.stop import Poll, defer
from letheon.errors import InputError, RunFailed
from letheon.loaders.order import epoch_parts
from letheon.methods.finetune import Finetune
from letheon.methods.neg_grad_plus import NegGradPlus
from letheon.methods.random_label import RandomLabel
from letheon.methods.spkd import Spkd
from letheon.methods.unsir import Unsir
from tests.engine.resume_tools import BreakAt, Lines, attempt
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import network, run_of, weights

# Batches of 8 in groups of 2: four groups, uneven on 3 ranks; the retain pass ends with 7 images.
GROUPS = Recipe(epochs=2, lr=0.02, batch_size=8, batch_norm_group=2, schedule="cosine")
FROZEN = replace(GROUPS, batch_norm_group=0, batch_norm="frozen", batch_size=7)
TOLERANCE = 2e-5
METHODS: dict[str, Method] = {
    "finetune": Finetune(GROUPS),
    "micro-batches": Finetune(replace(GROUPS, rank_batch=4)),
    "two halves": RandomLabel(replace(GROUPS, rank_batch=4), order="paired"),
    "gathered": Spkd(GROUPS, sp_weight=1.0),
    "two passes beside": NegGradPlus(GROUPS),
    "more rows than the batch": Unsir(GROUPS, noise_images=3, noise_steps=2, retain_share=0.6),
    "frozen": Spkd(replace(FROZEN, log_every=2, ema=0.5), sp_weight=1.0),
    "frozen, micro-batches": RandomLabel(
        replace(FROZEN, rank_batch=3, optimizer="adamw", lr=1e-3), order="paired"
    ),
    "rolled back": Finetune(replace(GROUPS, on_nonfinite="rollback")),
}
"""By what could go wrong."""
EVERY = {
    f"every {name}": method for name, method in cases(GROUPS, replace(GROUPS, lr=5e-3)).items()
}


def make_run(method: Method, ranks: Ranks, forgotten: range = range(0)) -> Run:
    run = run_of(method, ranks, forgotten=forgotten)
    run.recipe = run.recipe.divide_batch(ranks.world)
    return run


def batches() -> Iterator[Tensor]:
    """Sample numbers of each global batch of the retain pass, over both epochs."""
    forget = run_of(METHODS["finetune"]).forget.numpy()
    for epoch in range(GROUPS.epochs):
        for part in epoch_parts("retain", forget, GROUPS.batch_size, 0, epoch):
            yield torch.from_numpy(part.samples)


def plain_finetune() -> tuple[dict[str, Tensor], list[float]]:
    """Weights and mean losses of the epochs, in torch's functions: no loop, no layer of ours."""
    run, net = make_run(METHODS["finetune"], Ranks()), network().net
    images = {
        int(n): (image, label)
        for epoch in range(2)
        for batch in run.loader.train("retain", epoch)
        for n, image, label in zip(batch.index + 100 * epoch, batch.images, batch.labels)  # noqa: B905
    }
    conv, norm, head = net[0], net[1], net[5]
    parameters = [conv.weight, conv.bias, norm.weight, norm.bias, head.weight, head.bias]
    momentum = [torch.zeros_like(one) for one in parameters]
    steps = list(batches())
    losses: list[list[tuple[float, int]]] = [[], []]
    for number, samples in enumerate(steps):
        epoch = 2 * number // len(steps)
        pairs = [images[n + 100 * epoch] for n in samples.tolist()]
        x, labels = torch.stack([one for one, _ in pairs]), torch.stack([one for _, one in pairs])
        rows, count = len(samples), -(-len(samples) // 2)
        hidden = conv(x)
        groups = [hidden[k * rows // count : (k + 1) * rows // count] for k in range(count)]
        normal = [F.batch_norm(g, None, None, norm.weight, norm.bias, True) for g in groups]
        features = F.relu(torch.cat(normal)).mean((2, 3))
        loss = F.cross_entropy(F.linear(features, head.weight, head.bias), labels)
        gradient = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            mean = torch.stack([g.mean((0, 2, 3)) for g in groups]).mean(0)
            var = torch.stack([g.var((0, 2, 3)) for g in groups]).mean(0)
            norm.running_mean.copy_(0.9 * norm.running_mean + 0.1 * mean)
            norm.running_var.copy_(0.9 * norm.running_var + 0.1 * var)
            norm.num_batches_tracked += 1
            rate = GROUPS.rate(2 * number / len(steps))
            for one, slope, velocity in zip(parameters, gradient, momentum, strict=True):
                velocity.mul_(0.9).add_(slope + GROUPS.weight_decay * one)
                one -= rate * velocity
        losses[epoch].append((loss.item(), rows))
    means = [sum(v * n for v, n in one) / sum(n for _, n in one) for one in losses]
    return net.state_dict(), means


End = dict[str, tuple[dict[str, Tensor], list[float]]]


def end(ranks: Ranks, names: list[str]) -> End:
    """Weights and losses of whole runs."""
    ends = {}
    for name in names:
        method, losses = (METHODS | EVERY)[name], list[float]()

        def log(kind: str, losses: list[float] = losses, **of: float) -> None:
            losses += [of["loss"]] if kind == "phase" else []

        run = make_run(method, ranks)
        run_method(method, run, log)
        assert all("forward" not in vars(layer) for layer in run.model.modules())
        ends[name] = weights(run), losses
    return ends


def compare(one: End, other: End) -> None:
    for name, (expected, losses) in one.items():
        mine, own = other[name]
        for key, value in expected.items():
            torch.testing.assert_close(
                mine[key], value, atol=TOLERANCE, rtol=0, msg=f"{name} {key}"
            )
        assert own == pytest.approx(losses, abs=TOLERANCE, rel=TOLERANCE), name


@pytest.mark.slow
def test_groups_are_those_of_the_definition_on_any_ranks() -> None:
    names = list(METHODS)
    alone = end(Ranks(), names)
    plain = plain_finetune()
    for name in ("finetune", "micro-batches", "rolled back"):
        compare({name: plain}, alone)
    for world in (2, 3):
        for one in on_ranks(world, end, names):
            compare(alone, one)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_method_in_groups(world: int) -> None:
    alone = end(Ranks(), list(EVERY))
    # A bias below a batch-norm has a gradient of mere rounding, which AdamW divides by its size.
    for key in ("0.bias", "1.running_mean"):
        del alone["every dual-optim"][0][key]
    for one in on_ranks(world, end, list(EVERY)):
        compare(alone, one)


def stop_after(ranks: Ranks, folder: Path, stops: dict[str, int], resume: bool) -> None:
    """Begin or go on with each run for so many steps, save, and stop as by a kill."""
    for name, stop in stops.items():
        make = partial(make_run, METHODS[name], ranks)
        poll = BreakAt(ranks, stop, stop)
        assert attempt(METHODS[name], make, folder / name, poll, resume) is None


def finish(
    ranks: Ranks, folder: Path, resume: bool = True
) -> dict[str, tuple[dict[str, Tensor], Lines]]:
    ends = {}
    for name, method in METHODS.items():
        make = partial(make_run, method, ranks)
        ended = attempt(method, make, folder / name, Poll(ranks), resume)
        assert ended is not None
        ends[name] = ended[0], [line for line in ended[1] if line["kind"] == "phase"]
    return ends


@pytest.mark.slow
def test_ranks_come_and_go_within_a_pass(tmp_path: Path) -> None:
    """Three ranks, then one, then two, each stopped in the middle of a pass, end as one rank."""
    on_ranks(3, stop_after, tmp_path, dict.fromkeys(METHODS, 3), False)
    stops = {name: 4 if "frozen" in name else 2 for name in METHODS}
    stop_after(Ranks(), tmp_path, stops, True)
    ends = on_ranks(2, finish, tmp_path)
    for name, (expected, phases) in finish(Ranks(), tmp_path / "whole", False).items():
        losses = [line.pop("loss") for line in phases]
        mine = [line.pop("loss") for line in ends[0][name][1]]
        compare({name: (expected, losses)}, {name: (ends[0][name][0], mine)})
        compare({name: (expected, [])}, {name: (ends[1][name][0], [])})
        assert ends[0][name][1] == phases, name  # images read of each kind, rates


def test_what_ranks_have_added_up_is_shared_out() -> None:
    """Local batch-norm: statistics that differ become the mean of those who had samples."""
    tensors = {"model.bn": torch.tensor([1.0, 2.0])}
    for rank, (parts, mean) in enumerate(((3, 1.0), (1, 5.0), (0, 9.0))):
        own = {
            "random.cpu": torch.zeros(2),
            "buffer.bn": torch.tensor([mean, 2.0]),
            "buffer.same": torch.tensor(0.1),
            "buffer.count": torch.tensor(parts),
            "pass.0.sums.0": torch.tensor([0.5, 2.0, 1.0, 1.0]),
            "pass.0.broken.0": torch.tensor(7 - rank),
            "pass.0.flags.0": torch.tensor([False, True]),
            "pass.0.counts.0": torch.tensor([rank, 1], dtype=torch.int32),
            "pass.0.parts": torch.tensor(parts),
        }
        tensors |= {f"rank.{rank}.{name}": value for name, value in own.items()}
    facts: dict[str, Any] = {"world": 3, "between": False, "pass": {"progress": [0.1, 1.0]}}
    ours = share_out_state(RunState(tensors, facts), 2)
    assert ours.facts["pass"]["progress"] == [1.5, 6.0]
    expected = {
        "buffer.bn": [[2.0, 2.0]] * 2, "buffer.same": [torch.tensor(0.1).item()] * 2,
        "buffer.count": [3, 3], "pass.0.sums.0": [[1.5, 6.0, 3.0, 3.0], [0.0] * 4],
        "pass.0.broken.0": [5, 5], "pass.0.flags.0": [[False, True]] * 2,
        "pass.0.counts.0": [[3, 3], [0, 0]], "pass.0.parts": [0, 0],
    }  # fmt: skip
    assert {k: v.tolist() for k, v in ours.tensors.items()} == {
        "model.bn": [1.0, 2.0],
        **{f"rank.{r}.{name}": of[r] for name, of in expected.items() for r in (0, 1)},
    }
    assert share_out_state(RunState(tensors, facts), 3).tensors is tensors
    kept = share_out_state(RunState(tensors, facts | {"between": True}), 2).tensors
    assert list(kept) == ["model.bn"]


REFUSED: dict[str, dict[str, Any]] = {
    "in batches of 9; .* take 8": {"batch_size": 9},
    "with batch-norm frozen": {"batch_norm": "frozen"},
    "room for a group": {"rank_batch": 1},
    "0 or more": {"batch_norm_group": -2},
}


@pytest.mark.parametrize("words", REFUSED)
def test_groups_that_cannot_be_formed(words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(GROUPS, **REFUSED[words])


def test_ranks_and_layers_without_groups() -> None:
    assert [replace(GROUPS, rank_batch=4).divide_batch(n).grad_accum_steps for n in (1, 3)] == [
        2,
        1,
    ]
    with pytest.raises(InputError, match="4 batch-norm groups of 2 in a batch of 8 on 5 ranks"):
        GROUPS.divide_batch(5)
    with pytest.raises(InputError, match="SyncBatchNorm"):
        check_kinds(torch.nn.SyncBatchNorm(3))
    with pytest.raises(InputError, match="with a momentum"):
        check_kinds(torch.nn.BatchNorm2d(3, momentum=None))  # type: ignore[arg-type]
    groups = Groups(torch.nn.Sequential(layer := torch.nn.BatchNorm1d(3)), torch.device("cpu"))
    groups.sizes = (2, 2)
    with pytest.raises(RunFailed, match="6 images in a forward pass of 4"):
        layer(torch.zeros(6, 3))


def test_a_state_of_other_ranks_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that is rolled back is saved as it was shared out: for the ranks of now."""
    facts: dict[str, Any] = {"world": 3, "between": False, "pass": {"progress": None}}
    monkeypatch.setattr(saver_module, "restore", lambda course, found: None)
    record = Record(tmp_path, Ranks(), {}, False)
    saver = open_saver(record, Poll(Ranks()), False)
    monkeypatch.setattr(saver, "cut_log", lambda found: None)
    saver.previous = RunState({}, facts)
    course = Course(run_of(Finetune()), *[cast(Any, None)] * 4)
    try:
        found = saver.start(course)
    finally:
        defer(False)
    assert found is not None and found.facts["world"] == 1
