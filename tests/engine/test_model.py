"""The networks: public keys, features, sizes, presets, and padding worked by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv

from letheon.engine.models.classifier import Classifier, build, names
from letheon.engine.models.efficientnet_lite import SameConv2d, same_padding
from letheon.errors import InputError
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.digits import upstream
from letheon.loaders.preset import Preset

TORCHVISION = ("resnet18", "resnet34", "resnet50", "convnext_tiny", "swin_t", "vit_b_16")
CHEAP = ("small", "vgg16_bn_cifar", "resnet20", "resnet18_cifar", "efficientnet_lite0")


def images(model: Classifier, n: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = min(model.preset.size, 32)
    return torch.randn(n, 3, size, size, generator=generator)


@pytest.mark.parametrize("name", TORCHVISION)
def test_keys_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build(name, 7).net, tv.get_model(name, num_classes=7)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_weights_load_both_ways_and_compute_the_same(name: str) -> None:
    theirs = tv.get_model(name, num_classes=7).eval()
    ours = build(name, 7).eval()
    x = images(ours)
    ours.net.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(x).logits, theirs(x))
    other = build(name, 7, seed=1).eval()
    theirs.load_state_dict(other.net.state_dict(), strict=True)
    assert torch.equal(other(x).logits, theirs(x))


@pytest.mark.parametrize("name", TORCHVISION)
def test_presets_are_those_of_torchvisions_weights(name: str) -> None:
    published = tv.get_model_weights(name)["IMAGENET1K_V1"].transforms()
    with torch.device("meta"):
        preset = build(name, 2).preset
    assert [preset.size] == published.crop_size
    assert [preset.resize_to] == published.resize_size
    assert preset.interpolation == published.interpolation.value
    assert (list(preset.mean), list(preset.std)) == (published.mean, published.std)
    assert preset.resize == "short"


@pytest.mark.parametrize("name", [*CHEAP, "resnet18"])
def test_features_are_the_input_of_the_last_layer(name: str) -> None:
    model = build(name, 5).eval()
    x = images(model)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(
            before.logits, F.linear(before.features, model.head.weight, model.head.bias)
        )
        model.head.weight.normal_()
        after = model(x)
    assert torch.equal(before.features, after.features)
    assert not torch.equal(before.logits, after.logits)
    assert before.logits.shape == (2, 5)
    assert before.features.shape == (2, model.head.in_features)


@pytest.mark.parametrize("name", ["swin_t", "vit_b_16", "vit_tiny_16"])
def test_a_transformers_features_too(name: str) -> None:
    model = build(name, 5, preset=Preset(size=32)).eval()
    with torch.no_grad():
        out = model(images(model))
    assert torch.equal(out.logits, F.linear(out.features, model.head.weight, model.head.bias))


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [  # He et al. 2016, table 6 (CIFAR-10); Tan and Le's Lite0; torchvision's own for the rest
        ("resnet20", 10, 0.27),
        ("resnet32", 10, 0.46),
        ("resnet44", 10, 0.66),
        ("resnet56", 10, 0.85),
        ("resnet18_cifar", 10, 11.17),
        ("efficientnet_lite0", 1000, 4.65),
        ("vit_tiny_16", 1000, 5.72),
        ("resnet50", 1000, 25.56),
        ("vgg16_bn", 1000, 138.37),
        ("vgg16_bn_cifar", 10, 15.31),  # 14.71 M of convolutions, 0.59 M of head
    ],
)
def test_number_of_parameters(name: str, classes: int, millions: float) -> None:
    with torch.device("meta"):
        model = build(name, classes)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_option_a_shortcut_is_every_second_pixel_and_zero_channels() -> None:
    block = build("resnet20", 10).net.get_submodule("layer2.0")
    assert [key for key, _ in block.named_parameters()] == [
        "conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias",
    ]  # fmt: skip
    with torch.no_grad():
        block.get_parameter("bn2.weight").zero_()  # only the shortcut is left
        x = torch.rand(2, 16, 8, 8)
        y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, 0::2, 0::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_cifar_resnet18_keeps_the_resolution() -> None:
    net = build("resnet18_cifar", 10).net
    seen = []
    net.get_submodule("layer1").register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    net(torch.zeros(2, 3, 32, 32))
    assert seen == [(2, 64, 32, 32)]


@pytest.mark.parametrize(
    ("pixels", "kernel", "stride", "padding"),
    [  # total = (ceil(n / s) - 1) s + k - n, the odd one after
        (224, 3, 2, (0, 1)),  # 111 * 2 + 3 - 224 = 1
        (112, 5, 2, (1, 2)),  # 55 * 2 + 5 - 112 = 3
        (7, 3, 2, (1, 1)),  # 3 * 2 + 3 - 7 = 2
        (56, 5, 1, (2, 2)),  # 55 + 5 - 56 = 4
        (7, 1, 1, (0, 0)),
        (8, 1, 2, (0, 0)),  # 3 * 2 + 1 - 8 < 0
    ],
)
def test_same_padding_by_hand(
    pixels: int, kernel: int, stride: int, padding: tuple[int, int]
) -> None:
    assert same_padding(pixels, kernel, stride) == padding


def test_same_convolution_by_hand() -> None:
    conv = SameConv2d(1, 1, 3, 2)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        out = conv(torch.arange(16.0).reshape(1, 1, 4, 4))
    # Rows and columns 0..2 and 2..4, of which 4 is padding.
    assert out.flatten().tolist() == [45.0, 39.0, 66.0, 50.0]


def test_lite0s_strides_and_batch_norm() -> None:
    net = build("efficientnet_lite0", 10).eval().net
    seen = []
    for block in net.get_submodule("_blocks").children():
        block.register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape[1:3])))
    net(torch.zeros(1, 3, 64, 64))
    stages = [(16, 32), (24, 16), (40, 8), (80, 4), (112, 4), (192, 2), (320, 2)]
    repeats = [1, 2, 2, 3, 3, 4, 1]
    assert seen == [s for s, n in zip(stages, repeats, strict=True) for _ in range(n)]
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_weights_follow_from_the_seed_and_the_global_state_is_kept() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build("small", 10, seed=3)
    assert torch.equal(torch.rand(3), expected)
    again, other = build("small", 10, seed=3), build("small", 10, seed=4)
    assert torch.equal(
        first.net.get_parameter("conv4.weight"), again.net.get_parameter("conv4.weight")
    )
    assert not torch.equal(first.head.weight, other.head.weight)


def test_a_preset_of_another_size() -> None:
    preset = Preset(size=64, resize_to=72)
    assert build("resnet18", 3, preset=preset).preset is preset
    vit = build("vit_tiny_16", 3, preset=preset).eval()
    assert vit(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3)
    with pytest.raises(InputError, match="multiple of 16"):
        build("vit_tiny_16", 3, preset=Preset(size=40))


def test_refusals_name_what_comes_near() -> None:
    with pytest.raises(InputError, match=r"'resnet55'.*did you mean.*resnet56"):
        build("resnet55", 10)
    with pytest.raises(InputError, match="at least 2"):
        build("small", 1)
    assert set(TORCHVISION) | set(CHEAP) <= set(names())


def test_copies_memory_format_and_autocast() -> None:
    model = build("small", 10).eval()
    x = images(model, 4)
    with torch.no_grad():
        expected = model(x)
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
        out = twin(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out.logits, expected.logits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x)
    assert half.logits.dtype == torch.bfloat16
    torch.testing.assert_close(half.logits.float(), expected.logits, rtol=0.1, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "efficientnet_lite0"])
def test_compiles_whole(name: str) -> None:
    torch._dynamo.reset()  # a second size of image would be compiled for any size: half an hour
    model = build(name, 10).eval()
    x = images(model)
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(out.logits, model(x).logits, rtol=1e-4, atol=1e-4)
    assert out.features.shape == (2, model.head.in_features)


@pytest.mark.slow
def test_small_learns_the_digits() -> None:
    """Over 97 % of scikit-learn's held-out digits after eight epochs."""
    model = build("small", 10)
    train, test = upstream()
    nothing = torch.zeros(len(train), dtype=torch.bool).numpy()
    loader = TorchLoader(train, nothing, model.preset, 64, Reader(0))
    steps = 8 * loader.steps("mixed")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(8):
        for batch in loader.train("mixed", epoch):
            loss = F.cross_entropy(model(batch.images).logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    held_out = TorchLoader(test, nothing[: len(test)], model.preset, 256, Reader(0))
    with torch.no_grad():
        hits = sum(
            int((model(batch.images).logits.argmax(1) == batch.labels).sum())
            for batch in held_out.sweep()
        )
    assert hits / len(test) > 0.97


@pytest.mark.slow
def test_a_compiled_gradient_of_the_fast_network_in_bf16_is_that_without() -> None:
    """A maximum whose gradient looks for equal values gave 0 / 0 here, on a GPU and on the CPU."""
    torch._dynamo.reset()
    model = build("speed_cnn", 10, seed=0).train()
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 10
    ends = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(forward(x).logits, labels)
        loss.backward()
        ends.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, plain in zip(*ends, strict=True):
        assert (ours - plain).norm() < 0.2 * plain.norm()
