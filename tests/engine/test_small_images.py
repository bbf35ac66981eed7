"""Convolutions of small images as products: which they are, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.model_file import weights_digest
from letheon.engine.models import small_convolutions
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.models.small_convolutions import SmallConv2d, speed_small_images
from letheon.engine.models.teacher import frozen_copy
from letheon.engine.precision import Precision

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the images that were computed as products."""
    seen: list[torch.Size] = []
    ours = small_convolutions.small_conv2d

    def noted(image: Tensor, *rest: object) -> Tensor:
        seen.append(image.shape)
        return ours(image, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(small_convolutions, "small_conv2d", noted)
    return seen


def resnet() -> tuple[Classifier, Classifier, Tensor]:
    """A ResNet-18 as it is, a copy of it as the engine moves it to a CPU, and eight images."""
    plain = build("resnet18", 5, seed=1).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    Precision("fp32").apply(ours, CPU)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return plain, ours, images.to(memory_format=torch.channels_last)


def test_a_training_step_is_equal_to_rounding(calls: list[torch.Size]) -> None:
    plain, ours, images = resnet()
    assert weights_digest(plain) == weights_digest(ours)
    assert list(plain.state_dict()) == list(ours.state_dict())
    losses = []
    for model in (plain, ours):
        loss = model.train()(images).logits.logsumexp(1).mean()
        loss.backward()
        losses.append(loss.detach())
    assert len(calls) == 5  # the last stage: four 3 x 3, and the 1 x 1 beside them
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        mine, other = parameter.grad, theirs[name].grad
        assert mine is not None and other is not None and mine.stride() == other.stride()
        assert (mine - other).norm() <= 1e-3 * other.norm() + 1e-6, name


def test_under_autocast_it_gives_what_autocast_gives(calls: list[torch.Size]) -> None:
    plain, ours, images = resnet()
    with torch.no_grad(), Precision("bf16").autocast(CPU):
        theirs, mine = (model.eval()(images).features for model in (plain, ours))
    assert len(calls) == 5
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert (mine - theirs).float().norm() < 0.02 * theirs.float().norm()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_folded_teacher_takes_it_too(calls: list[torch.Size], dtype: str) -> None:
    _, ours, images = resnet()
    precision = Precision(dtype)  # type: ignore[arg-type]
    teacher = frozen_copy(ours, precision)
    with torch.no_grad(), precision.autocast(CPU):
        teacher(images)
    assert len(calls) == 5


def test_large_images_and_small_batches_are_the_librarys(calls: list[torch.Size]) -> None:
    _, ours, images = resnet()
    with torch.no_grad():
        ours.eval()(images[:7])
        ours(torch.randn(8, 3, 128, 128))
    assert calls == []


def test_what_is_not_plain_stays_as_it_is() -> None:
    net = nn.Sequential(
        nn.Conv2d(256, 256, 3, groups=2),
        nn.Conv2d(256, 256, 3, dilation=2),
        nn.Conv2d(256, 256, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(256, 256, 3, padding="same"),
        nn.Conv2d(16, 16, 3),
        nn.ConvTranspose2d(256, 256, 3),
        type("Own", (nn.Conv2d,), {})(256, 256, 3),
        nn.Conv2d(256, 256, 3, padding=1),
    )
    kinds = [type(module) for module in net]
    speed_small_images(net)
    assert [type(module) for module in net] == [*kinds[:-1], SmallConv2d]


def test_other_memory_orders_and_formats_are_the_librarys(calls: list[torch.Size]) -> None:
    conv = nn.Conv2d(256, 256, 3, padding=1)  # weights not channels-last
    speed_small_images(conv)
    assert type(conv) is SmallConv2d
    conv(torch.randn(8, 256, 2, 2))
    conv.double().to(memory_format=torch.channels_last)
    conv(torch.randn(8, 256, 2, 2).double())
    conv.float()(torch.randn(256, 2, 2))
    with pytest.raises(RuntimeError):  # torch's own words for what does not fit
        conv(torch.randn(8, 3, 2, 2))
    assert calls == []
    conv(torch.randn(8, 256, 2, 2))
    assert len(calls) == 1


def test_in_a_compiled_graph_it_is_the_librarys(calls: list[torch.Size]) -> None:
    conv = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    speed_small_images(conv)
    images = torch.randn(8, 256, 2, 2)
    torch._dynamo.reset()
    graph = torch.compile(conv, backend="eager", fullgraph=True)
    whole = graph(images)
    assert calls == []
    torch.testing.assert_close(whole, conv(images), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
