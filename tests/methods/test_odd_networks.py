"""Networks and losses that leave weights out, without batch-norm, with attention: done or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Phase, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.numbers.sample_gradients import SampleGradients
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError, RunFailed
from letheon.loaders.batch import Batch
from letheon.methods.cf_k import CfK
from letheon.methods.cmf import Cmf
from letheon.methods.cola import Cola
from letheon.methods.finetune import Finetune, cross_entropy
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.influence import sample_losses
from letheon.methods.random_label import RandomLabel
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import PRESET, network, run_of, weights

RECIPE = Recipe(epochs=1, lr=0.01, batch_size=7)
METHODS = cases(Recipe(epochs=1, lr=1e-3, batch_size=64))


class Spare(nn.Module):
    """A linear network that holds weights which no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare, self.head = nn.Linear(192, 5), nn.Linear(3, 3), nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(images.flatten(1)).relu())
        return output


class Attends(nn.Module):
    """One encoder layer of torch's own over 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 8, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 2, stride=2).transpose(1, 2)
        output: Tensor = self.head(self.layer(patches).mean(1))
        return output


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 4)),
    "spare": Spare,
    "attends": Attends,
    "one value": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
    ),
    "head": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
}


def build(name: str) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(NETS[name](), name, PRESET)


@dataclass(frozen=True)
class Features(Method):
    """Pull features to zero, which leaves the head out, then train all: a plug-in's two phases."""

    name: ClassVar[str] = "features"
    recipe: Recipe = RECIPE

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        def pull(net: nn.Module, batch: Batch) -> Tensor:
            features: Tensor = net(batch.images).features
            return features.square().mean()

        return [Phase("pull", "forget", pull, "frozen"), Phase("retain", "retain", cross_entropy)]


# case: (method, network; None for the one with batch-norm, samples to forget; none for a class)
CASES: dict[str, tuple[Method, str | None, Sequence[int]]] = {
    "two phases, spare weights": (RandomLabel(RECIPE, order="sequential"), "spare", ()),
    "no batch-norm, an idle rank": (GradAscent(RECIPE, forget_batch_norm="recipe"), "plain", [3]),
    "statistics that rest, an idle rank": (CfK(RECIPE, k=1), None, range(40)),
}


def ends(ranks: Ranks) -> tuple[list[dict[str, Tensor]], str]:
    """Weights after each case, and what is said of a loss that leaves weights out."""
    found = []
    for method, net, forgotten in CASES.values():
        run = run_of(method, ranks, forgotten=forgotten)
        run.model = network() if net is None else build(net)
        run_method(method, run)
        found.append(weights(run))
    try:
        run_method(Features(), run_of(Features(), ranks))
    except RunFailed as error:
        return found, str(error)
    return found, ""


def test_weights_that_no_gradient_reaches_and_ranks_without_a_sample() -> None:
    alone, said = ends(Ranks())
    assert said == ""  # one rank waits for none
    for theirs, line in on_ranks(2, ends):
        for mine, other in zip(alone, theirs, strict=True):
            for key, value in mine.items():
                torch.testing.assert_close(other[key], value, atol=2e-5, rtol=0, msg=key)
        assert "leaves weights out" in line and "use reduce flat" in line and "\n" not in line


def test_gradients_of_samples_through_attention() -> None:
    """Forward derivatives of torch's own attention, against a backward pass for each sample."""
    run = run_of(Finetune(RECIPE))
    run.model = build("attends").eval()
    gradients = SampleGradients(run, "forget", sample_losses)
    vector = [torch.full_like(weight, 0.1) for weight in run.parameters]
    found = dict(zip(gradients.index.tolist(), gradients.times(vector).tolist(), strict=True))
    assert torch.backends.mha.get_fastpath_enabled()
    run.model.train()  # training's own attention, which has no fast path; without its dropout
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    run.model.net.layer.self_attn.dropout = 0.0  # type: ignore[union-attr]
    for batch in run.loader.sweep(list(found)):
        for k, index in enumerate(batch.index.tolist()):
            loss = F.cross_entropy(run.model(batch.images[k : k + 1]).logits, batch.labels[k, None])
            grads = torch.autograd.grad(loss, run.parameters)
            expected = 0.1 * sum(float(grad.sum()) for grad in grads)
            assert found[index] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_one_forget_sample_without_batch_norm_in_bf16(name: str) -> None:
    """In one batch of all others; what is defined by class refuses it."""
    run = run_of(METHODS[name], forgotten=[5])
    run.model, run.precision, run.held_out = build("plain"), Precision("bf16"), lambda: run.loader
    try:
        METHODS[name].check(run)
    except InputError as error:
        assert name in ("unsir", "head-distillation") and "got single samples" in str(error)
        return
    run_method(METHODS[name], run)
    assert all(bool(weight.isfinite().all()) for weight in run.model.parameters())


def test_a_batch_norm_of_one_value_is_refused_in_one_line() -> None:
    method = Finetune(replace(RECIPE, batch_size=1))
    run = run_of(method)
    run.model = build("one value")
    with pytest.raises(RunFailed, match="got a single value .* phase retain; .* batch_norm frozen"):
        run_method(method, run)
    method = Finetune(replace(RECIPE, batch_size=1, batch_norm="frozen"))
    run.recipe = method.recipe
    run_method(method, run)


@pytest.mark.parametrize("method", [Cmf(), Cola()])
def test_a_head_alone_has_no_features_to_move(method: Method) -> None:
    run = run_of(method)
    run.model = build("head")
    with pytest.raises(InputError, match="got head, .* no weights before its last layer"):
        method.check(run)
