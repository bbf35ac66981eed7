"""Evaluation of networks split over the ranks: the table of one rank, from a part on each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torchvision.models import VisionTransformer

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.distributed import Ranks
from letheon.engine.memory.shards import is_split, own_part
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.original_check import Look, check_original
from letheon.engine.precision import Precision
from letheon.engine.runs.plan import JobOptions
from letheon.errors import InputError
from letheon.eval.attacks.session import Lessons, attack_table, measure_all, relearn_table
from letheon.eval.case import Conditions
from letheon.eval.comparison import Comparison, Entry, assemble_comparison
from letheon.eval.evaluate import Extent, Inference, Measuring, Table
from letheon.eval.examples import find_examples
from letheon.eval.row_builder import Row
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import resolve
from tests.pool import on_ranks
from tests.world import PRESET, images

WHOLE = JobOptions(device="cpu", precision=Precision("fp32"), loader="torch")
SPLIT = replace(WHOLE, precision=Precision("fp32", reduce="shard"))
FULL = Extent(depth="full", relearn=4, attacks=4, flip=True, shift=True)


def vit(seed: int) -> Classifier:
    """Two transformer blocks, a class token, positions: what lies in no block, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = VisionTransformer(8, 4, 2, 2, 12, 20, num_classes=4)
        torch.nn.init.normal_(net.heads[-1].weight)
        model = Classifier(net, "vit", PRESET).eval()
    model.class_names = tuple(f"c{c}" for c in range(4))
    return model


def comparison() -> Comparison:
    train, test = images(41), images(30)
    data = Data(train, test, tuple((name,) for name in train.classes))
    models = {"original": vit(1), "retrained": vit(2), "unlearned": copy.deepcopy(vit(1))}
    with torch.no_grad():
        models["unlearned"].head.bias[2] -= 3
    entries = [Entry(role, role, model, weights_digest(model)) for role, model in models.items()]
    return assemble_comparison(entries, data, {"art": images(37)}, resolve("class:2", data))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, one in pairs for k, v in flat(one, f"{path}/{key}").items()}
    return {path: value}


def table(ranks: Ranks, job: JobOptions) -> dict[str, Any]:
    """A quick row, and the outputs that a full row is made of."""
    of = comparison()
    quick, full = (
        Measuring(job, of, Conditions(), extent, 16, ranks) for extent in (Extent(flip=True), FULL)
    )
    outputs = {}
    for key, own in full.inference.sweep(of.entries[:1])[0].outputs.items():
        columns = {"features": own.features, "logits": own.logits, **own.taps}
        outputs[key] = {name: own.gather(column).tolist() for name, column in columns.items()}
    return flat({"rows": measure_all(quick).flat, "outputs": outputs})


def attacks(ranks: Ranks, job: JobOptions) -> dict[str, Any]:
    """Relearn curves and all attacks."""
    of = Measuring(job, comparison(), Conditions(), FULL, 16, ranks)
    found, lessons = (
        Table([Row(entry.name) for entry in of.comparison.entries]),
        Lessons(of.inference, of.comparison.find_original()),
    )
    relearn_table(of, found, lessons)
    attack_table(of, found, lessons)
    return flat(found.flat)


def compare(work: Callable[[Ranks, JobOptions], dict[str, Any]], names: Sequence[str]) -> None:
    whole = work(Ranks(), WHOLE)
    for found in on_ranks(2, work, SPLIT):
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            near = pytest.approx(value, rel=2e-5, abs=2e-5) if isinstance(value, float) else value
            assert found[key] == near, key
    assert not [name for name in names if not any(name in key for key in whole)]


def held(ranks: Ranks) -> list[Any]:
    """Numbers of a network that this rank's device holds, refusals, and calls of a page."""
    of = comparison()
    inference = Inference(SPLIT, of, FULL, 7, ranks)
    entry = of.entries[0]
    placed = inference.place(entry.model)
    assert is_split(placed) and not is_split(entry.model)
    loader = inference.loader("train", entry, ranks)
    mask = torch.from_numpy(of.forget_mask("train"))
    check_original(Look(placed, loader, mask, SPLIT.precision, ranks, lambda preset: loader))
    lines = []
    try:
        Measuring(SPLIT, of, Conditions(), replace(FULL, critic="layers"), 7, ranks)
    except InputError as error:
        lines.append(str(error))
    loader.images.read_many = broken if ranks.main else loader.images.read_many
    try:
        inference.read("train", entry, [1, 2])
    except InputError as error:
        lines.append(str(error))
    calls = find_examples(replace(inference, comparison=comparison()), ["original"])["answers"]
    return [sum(own_part(p).numel() for p in placed.parameters()), lines, calls]


def broken(indices: Any) -> Any:
    raise InputError("got image 1, which cannot be read")


@pytest.mark.slow
def test_a_split_networks_row_is_that_of_one_rank() -> None:
    compare(table, ["RA", "knn", "cka", "logits", "net.encoder"])


@pytest.mark.slow
def test_relearning_and_attacks_of_a_split_network_are_those_of_one_rank() -> None:
    learned = ["relearn/whole network", "relearn/head only", "attack_prompt", "attack_retain"]
    compare(attacks, [*learned, "attack_quantized", "mode_barrier", "over_unlearning"])


def test_each_ranks_device_has_a_part_alone() -> None:
    numbers = sum(p.numel() for p in vit(1).parameters())
    answers = on_ranks(2, held)
    assert sum(count for count, _, _ in answers) == numbers
    assert max(count for count, _, _ in answers) < 0.6 * numbers
    for _, lines, calls in answers:
        assert "critic layers with reduce shard" in lines[0] and "cannot be read" in lines[1]
        assert calls == answers[0][2] and calls
