"""Options of training from new weights, against their definitions written out."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.models.classifier import build
from letheon.engine.recipe import Recipe
from letheon.engine.runs.plan import JobOptions
from letheon.errors import InputError
from letheon.launch.api import plan_forgetting
from letheon.launch.command import parse
from letheon.loaders.batch import Batch, Reads, Stream
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import Request
from letheon.methods.finetune import cross_entropy
from letheon.methods.retrain import Retrain
from letheon.methods.train import Train
from tests.launch_tools import ROOT, SCRIPTS
from tests.world import PRESET, images, network, run_of, trained

RECIPE = Recipe(epochs=1, lr=0.1, batch_size=64, momentum=0.0, weight_decay=0.3)


def one_batch(reads: Reads) -> Batch:
    (batch,) = run_of(Train(RECIPE)).loader.train(reads, 0)
    return batch


def test_smoothing_spreads_a_share_of_the_label() -> None:
    model, batch = network().eval(), one_batch("mixed")
    logs = model(batch.images).logits.log_softmax(1)
    target = torch.full_like(logs, 0.2 / 4)
    target[torch.arange(len(logs)), batch.labels] += 0.8
    expected = -(target * logs).sum(1).mean()
    torch.testing.assert_close(cross_entropy(model, batch, 0.2), expected)


def test_biases_and_batch_norm_keep_from_decaying_where_asked() -> None:
    model, batch = network().train(), one_batch("retain")
    names = [name for name, _ in model.named_parameters()]
    weights = list(model.parameters())
    loss = cross_entropy(model, batch, 0.1)
    grads = torch.autograd.grad(loss, weights)
    run, _ = trained(Retrain(RECIPE, label_smoothing=0.1, decay_norms=False))
    found = dict(run.model.named_parameters())
    for name, weight, grad in zip(names, weights, grads, strict=True):
        decay = 0.3 if weight.dim() > 1 else 0.0
        torch.testing.assert_close(found[name], weight - 0.1 * (grad + decay * weight))
    assert {name for name in names if found[name].dim() < 2} == {
        "net.0.bias", "net.1.weight", "net.1.bias", "net.5.bias",
    }  # fmt: skip


def test_images_grow_at_their_epochs_and_the_model_keeps_its_size() -> None:
    method = Train(replace(RECIPE, epochs=4), sizes=(8, 12, 16), grow_at=(1, 3))
    run = run_of(method)
    sizes: list[int] = []
    inner = run.loader.train

    def watched(stream: Stream, epoch: int, skip: int = 0) -> Iterator[Batch]:
        for batch in inner(stream, epoch, skip):
            sizes.append(batch.images.shape[-1])
            yield batch

    run.loader.train = watched  # type: ignore[method-assign]
    lines: list[str] = []
    run_method(method, run, lambda kind, **numbers: lines.append(str(numbers.get("phase"))))
    assert sizes == [8, 12, 12, 16]
    assert [line for line in lines if line.startswith("all")] == [
        "all 8 px",
        "all 12 px",
        "all 12 px",
        "all 16 px",
    ]
    assert run.model.preset == PRESET


def test_what_does_not_fit_is_refused() -> None:
    for wrong in (
        {"label_smoothing": 1.0}, {"sizes": (4,)}, {"sizes": (8, 16)}, {"grow_at": (3,)},
        {"sizes": (8, 12, 16), "grow_at": (3, 2)}, {"sizes": (8, 16), "grow_at": (0,)},
    ):  # fmt: skip
        with pytest.raises(InputError, match="got"):
            Retrain(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("epochs", "grow"), [(16, 12), (32, 25), (88, 71)])
def test_the_presets_parse_and_grow_where_ffcv_imagenet_does(
    model: str, epochs: int, grow: int
) -> None:
    script = ROOT / "launch" / "recipes" / "imagenet-fast.sh"
    ended = subprocess.run(
        ["sh", str(script), "/data/imagenet", model, str(epochs), "file:list.txt"],
        env={**os.environ, "DRY": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for line in ended.stdout.splitlines():
        script_name, *words = line.split()
        settings = parse(SCRIPTS[script_name.removesuffix(".py")].Settings, words)
        if script_name != "evaluate.py":
            method = settings.method
            # Published: interpolated from 160 to 192 between two epochs, in steps of 32.
            start, end = {16: (11, 13), 32: (23, 27), 88: (65, 76)}[epochs]
            sizes = [32 * round(float(np.interp(e, [start, end], [160, 192])) / 32)
                     for e in range(epochs)]  # fmt: skip
            assert [method.size(e) for e in range(epochs)] == sizes
            assert method.recipe.rate(2) == method.recipe.lr > method.recipe.rate(3)
            assert method.recipe.rate(epochs) == 0 == method.recipe.rate(0)
    assert grow == sizes.index(192)


def test_a_retrain_draws_from_a_stream_of_its_own() -> None:
    """First weights, order and augmentation are not those of training with the same seed."""
    own, shared = Retrain(RECIPE), Retrain(RECIPE, share_seed=True)
    data, ranks = images(), Ranks()
    request = Request("class:2", (2,), None, "d")
    job = JobOptions(seed=1, device="cpu", loader="torch", workers=0)
    model = build("small", 4, job.seed)
    plans = [plan_forgetting(job, each, model, Data(data, data, ()), request, ranks)
             for each in (shared, own)]  # fmt: skip
    (same, alike), (plan, run) = plans
    assert same.seed == alike.seed == 1 == plan.job.seed
    assert plan.seed == run.seed == own.stream_seed(1) not in (1, own.stream_seed(2))
    first = [p.model.net.state_dict()["conv1.weight"] for p in (same, plan)]
    trained = build("small", 4, 1).net.state_dict()["conv1.weight"]
    assert torch.equal(first[0], trained) and not torch.equal(first[1], trained)
    orders = [torch.cat([b.index for b in r.loader.train("mixed", 0)]) for r in (alike, run)]
    assert not torch.equal(orders[0], orders[1])
