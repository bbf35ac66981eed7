"""The folded teacher answers as the network it was made from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.models.teacher import (
    Teachers,
    fold_batch_norms,
    frozen_copy,
    teacher_features,
)
from letheon.engine.passes.one_pass import Log
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.runs.together import Member, run_together
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.methods.finetune import Finetune
from letheon.methods.spkd import Spkd
from tests.world import PRESET, network, run_of, weights
from tests.world import images as images_of_the_world

# Features and logits are of the order of 1; folding rounds each weight once more.
TOLERANCE = 1e-4


def lived_in(name: str) -> Classifier:
    """Batch-norms as after training."""
    model = build(name, 7, seed=1)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", ["small", "resnet20", "resnet18", "efficientnet_lite0"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_folded_network_answers_the_same(name: str, channels_last: bool) -> None:
    model = lived_in(name)
    images = torch.randn(3, 3, 64, 64)
    teacher = frozen_copy(model, Precision("fp32", channels_last))
    own = name == "efficientnet_lite0"  # convolutions of its own kind, which are left alone
    assert batch_norms(model) > 0 and batch_norms(teacher) == own * batch_norms(model)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert teacher.head is not model.head and teacher.classes == 7
    for ours, theirs in zip(teacher(images), model(images), strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, atol=TOLERANCE, rtol=0)


def test_under_autocast_it_is_as_near_the_truth_as_the_network_itself() -> None:
    model = lived_in("resnet20")
    images = torch.randn(8, 3, 32, 32)
    truth = model(images).features
    teacher = frozen_copy(model, Precision("bf16"))
    assert next(teacher.parameters()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = teacher(images).features.float(), model(images).features.float()
    error, own = (ours - truth).norm(), (theirs - truth).norm()
    assert error < 1.5 * own and error < 0.02 * truth.norm()


def test_the_network_is_not_touched_and_the_copy_does_not_follow() -> None:
    run = run_of(Finetune())
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    images = torch.randn(2, 3, 8, 8)
    teacher = run.teacher()
    answer = teacher(images).logits
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
    assert run.teacher() is not teacher  # a teacher made now is another
    assert torch.equal(teacher(images).logits, answer)


def test_runs_from_the_same_weights_have_one_teacher() -> None:
    one, same, other, half = (run_of(Finetune()) for _ in range(4))
    for run in (same, other, half):
        run.teachers = one.teachers
    with torch.no_grad():
        other.parameters[0].view(-1)[0] += 1e-3
    assert one.teacher() is same.teacher()
    assert other.teacher() is not one.teacher()
    half.precision = Precision("bf16")
    assert half.teacher() is not one.teacher()


def test_a_teacher_is_of_its_own_call() -> None:
    """Equal weights in a network that computes otherwise have another answer."""
    hooked, plain = run_of(Finetune()), run_of(Finetune())
    for layer in hooked.model.net.children():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda module, images, output: output * 0.5)
    images = torch.randn(2, 3, 8, 8)
    first, second = hooked.teacher(), plain.teacher()
    for run, teacher in ((hooked, first), (plain, second)):
        truth = run.model.eval()(images).features
        torch.testing.assert_close(teacher(images).features, truth, atol=1e-5, rtol=1e-4)


class Counted:
    """How often a teacher has run."""

    def __init__(self, teacher: Classifier):
        self.teacher, self.calls = teacher, 0  # runs share it as long as someone holds it
        self.hook = teacher.register_forward_hook(lambda *_: self.count())

    def count(self) -> None:
        self.calls += 1


def test_a_teacher_answers_the_same_batch_once() -> None:
    teacher = run_of(Finetune()).teacher()
    images, others = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    wanted, other = teacher(images).features, teacher(others).features
    counted = Counted(teacher)
    for asked, answer, calls in (
        (images, wanted, 1),
        (images, wanted, 1),  # the same batch
        (others, other, 2),
        (images, wanted, 3),  # only the last is kept
        (images.clone(), wanted, 4),  # equal numbers in another batch
    ):
        assert torch.equal(teacher_features(teacher, asked), answer)
        assert counted.calls == calls
    kept = others.clone()
    teacher_features(teacher, kept)
    kept.copy_(images)  # the tensor is the same, its numbers are not
    assert torch.equal(teacher_features(teacher, kept), wanted)
    counted.hook.remove()


def test_two_runs_of_one_pass_ask_their_teacher_once_a_batch() -> None:
    recipe = Recipe(epochs=2, lr=0.01, batch_size=7)
    methods = [Spkd(recipe, sp_weight=weight) for weight in (10.0, 100.0)]
    alone = []
    for method in methods:
        run = run_of(method)
        run_method(method, run)
        alone.append(weights(run))
    data, ended, counts, kept = images_of_the_world(), [], [], []
    teachers = Teachers()

    def member(method: Method) -> Member:
        def start() -> tuple[Run, Log, None]:
            run = run_of(method)
            run.precision, run.teachers = run.precision.resolve(run.ranks.device), teachers
            forget = run.forget.numpy()
            run.loader = TorchLoader(data, forget, PRESET, recipe.batch_size, Reader(0))
            if not counts:
                kept.append(run.teacher())  # one teacher lives as long as somebody holds it
                counts.append(Counted(kept[0]))
            return run, lambda *_, **__: None, None

        return Member(str(method), method, start, lambda run, _: ended.append(weights(run)))

    assert not run_together([member(method) for method in methods], Ranks())
    steps = 2 * run_of(methods[0]).loader.steps("retain")
    assert counts[0].calls == steps  # not 2 * steps
    for ours, theirs in zip(ended, alone, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Twice(nn.Module):
    """One convolution before two batch-norms; folding either would change the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.one.weight.data.fill_(2.0)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.conv(self.one(self.conv(x)))).mean((2, 3)))


class Branching(nn.Sequential):
    """Its way depends on the values, which no trace can follow."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if input.sum() > 0 else -input)


def test_what_cannot_be_folded_stays_as_it_is() -> None:
    preset = replace(network().preset)
    for net in (Twice(), Branching(*network().net.children())):
        model = Classifier(net, "odd", preset).eval()
        norms = batch_norms(model)
        images = torch.randn(2, 3, 8, 8)
        teacher = frozen_copy(model, Precision("fp32", channels_last=False))
        assert batch_norms(teacher) == norms
        assert torch.equal(teacher(images).logits, model(images).logits)
    transformer = build("vit_tiny_16", 3, preset=replace(build("vit_tiny_16", 3).preset, size=32))
    assert fold_batch_norms(transformer.net) is transformer.net
