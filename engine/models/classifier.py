"""The image classifiers, by name: one contract over torchvision's networks and a few of our own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from letheon.engine.models.cifar_resnet import CifarResNet, resnet18_cifar
from letheon.engine.models.efficientnet_lite import EfficientNetLite0
from letheon.engine.models.small import Small
from letheon.engine.models.small_convolutions import SmallConv2d
from letheon.engine.models.speed_cnn import SpeedCnn
from letheon.engine.models.timm_model import PREFIX, preset_of_timm, timm_network
from letheon.engine.models.vgg import CifarVgg
from letheon.errors import InputError, suggest
from letheon.loaders.canaries import Canaries
from letheon.loaders.forget_request import Request
from letheon.loaders.preset import Preset


class Output(NamedTuple):
    """What a classifier returns; under autocast both are of the autocast type."""

    logits: Tensor  # (B, classes)
    features: Tensor  # (B, D), the input of the last linear layer


class Head(nn.Linear):
    """The last linear layer; it returns its input beside the logits, so that no hook is needed."""

    def forward(self, features: Tensor) -> Output:  # type: ignore[override]
        """(B, D) to the logits (B, classes) and the same features."""
        return Output(F.linear(features, self.weight, self.bias), features)


class Classifier(nn.Module):
    """A copy of a network with its name and its input preset; the network handed in is untouched.

    `net` is the architecture itself, with its own public keys: save and load `net.state_dict()`.
    `plain_net` gives it back without the layer kinds of ours. `head` is the dotted path of the
    linear layer whose output is the network's; by default the one registered last. Without
    `copy_net` the network itself is taken, and changed: for one that nobody else holds.

    Raises:
        InputError: the network has no plain linear layer to be its head.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str,
        preset: Preset,
        head: str | None = None,
        copy_net: bool = True,
    ):
        super().__init__()
        self.net = net = copy.deepcopy(net) if copy_net else net
        self.name = name
        self.preset = preset
        self.class_names: tuple[str, ...] | None = None
        self.requests: tuple[Request, ...] = ()  # what it was made to forget, the oldest first
        self.canaries: Canaries | None = None  # planted in its original's training images
        self.head_path = _last_linear(net) if head is None else head
        linear = net.get_submodule(self.head_path)
        if type(linear) not in (nn.Linear, Head):
            raise InputError(
                f"got {type(net).__name__}, whose last linear layer {self.head_path} is a "
                f"{type(linear).__name__}; expected nn.Linear; replace that layer by one"
            )
        assert isinstance(linear, nn.Linear)
        self._replace(self.head_path, _linear_like(Head, linear))

    def _replace(self, path: str, layer: nn.Module) -> None:
        if path:
            self.net.set_submodule(path, layer)
        else:
            self.net = layer

    def plain_net(self) -> nn.Module:
        """Copy the network with torch's own layers: what `net` was before it was wrapped.

        Its weights are bitwise these, its keys are the same, and pickling it needs none of our
        code unless the architecture itself is ours.
        """
        plain = copy.deepcopy(self.net)
        for module in plain.modules():
            if type(module) is SmallConv2d:
                module.__class__ = nn.Conv2d  # type: ignore[assignment]
        head = plain.get_submodule(self.head_path)
        assert isinstance(head, Head)
        linear = _linear_like(nn.Linear, head)
        if not self.head_path:
            return linear
        plain.set_submodule(self.head_path, linear)
        return plain

    @property
    def head(self) -> Head:
        """The last linear layer."""
        head = self.net.get_submodule(self.head_path)
        assert isinstance(head, Head)
        return head

    @property
    def head_is_last(self) -> bool:
        """Whether the head is the linear layer registered last, as where nothing else is said."""
        return self.head_path == _last_linear(self.net)

    @property
    def classes(self) -> int:
        """Number of logits; it follows the head where a method widens it."""
        return self.head.out_features

    def forward(self, images: Tensor) -> Output:
        """(B, 3, H, W), normalised by the preset, to logits (B, classes) and features (B, D).

        Raises:
            InputError: the network returns something else than its head's output.
        """
        output = self.net(images)
        if not isinstance(output, Output):
            raise InputError(
                f"got {self.name}, which returns a {type(output).__name__} in "
                f"{'training' if self.training else 'evaluation'} mode; expected the output of "
                f"its layer {self.head_path} in either mode; return that alone",
                option="model",
            )
        return output


def build(name: str, classes: int, seed: int = 0, preset: Preset | None = None) -> Classifier:
    """A freshly initialised classifier on the CPU in float32.

    The weights are a function of (name, classes, seed, preset.size) alone, so every rank builds the
    same ones; the global random state is left as it was. `preset` replaces the model's own; the
    size matters to the vision transformers' weights and to no other's.

    Raises:
        InputError: an unknown name, fewer than two classes, or a size the network cannot take.
    """
    default = preset_of(name)
    if classes < 2:
        raise InputError(
            f"got {classes} classes; expected at least 2; a classifier must have a choice"
        )
    preset = preset or default
    with torch.random.fork_rng(devices=[]):
        # The generator itself: torch.manual_seed would also seed CUDA, which fork_rng leaves out.
        torch.default_generator.manual_seed(seed)
        if name.startswith(PREFIX):
            net = timm_network(name, classes, preset.size)
        else:
            net = _MODELS[name][0](classes, preset.size)
        return Classifier(net, name, preset, copy_net=False)


def preset_of(name: str) -> Preset:
    """Return how an architecture wants its images, where nothing else says it.

    Raises:
        InputError: an unknown name.
    """
    if name.startswith(PREFIX):
        return preset_of_timm(name)
    if name not in _MODELS:
        raise InputError(
            f"got model {name!r}; known are {', '.join(names())} and timm:NAME"
            f"{suggest(name, _MODELS)}",
            option="model",
        )
    return _MODELS[name][1]


def names() -> tuple[str, ...]:
    """The names `build` knows."""
    return tuple(_MODELS)


def _last_linear(net: nn.Module) -> str:
    """Find the dotted path of the linear layer registered last: in every network here, the head."""
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise InputError(
            f"got {type(net).__name__}, which has no nn.Linear; expected a classifier that ends in "
            "one; end it in a linear layer"
        )
    return paths[-1]


class _NoDraws(TorchFunctionMode):
    """Leaves out normal numbers on meta: for them torch imports its compiler, a second or two."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.normal_, nn.init.normal_):  # the second gives its tensor by name
            tensor: Tensor = args[0] if args else (kwargs or {})["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Within it networks are built on meta: keys and shapes, and no memory for the weights."""
    with torch.device("meta"), _NoDraws():
        yield


L = TypeVar("L", bound=nn.Linear)


def _linear_like(kind: type[L], linear: nn.Linear) -> L:
    """Make a layer of another kind that holds the very parameters of `linear`."""
    with torch.device("meta"):  # its own weights are never used
        layer = kind(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.weight, layer.bias = linear.weight, linear.bias
    layer.training = linear.training
    return layer


def _vit(patch: int, layers: int, heads: int, width: int, mlp: int) -> Make:
    def make(classes: int, size: int) -> nn.Module:
        if size % patch:
            raise InputError(
                f"got {size} pixels for a vision transformer of patch {patch}; "
                f"give a multiple of {patch}",
                option="size",
            )
        # here: torchvision's operators bring torch's compiler, which takes a second to import
        from torchvision.models import VisionTransformer

        return VisionTransformer(size, patch, layers, heads, width, mlp, num_classes=classes)

    return make


def _torchvision(name: str) -> Make:
    def make(classes: int, size: int) -> nn.Module:
        import torchvision.models  # here: it brings torch's compiler, a second to import

        net: nn.Module = getattr(torchvision.models, name)(num_classes=classes)
        return net

    return make


Make = Callable[[int, int], nn.Module]  # (classes, size) to a network whose last linear is its head

_IMAGENET = Preset(size=224, resize="short", resize_to=256)
# ImageNet's mean and std on CIFAR, as the public ResNet checkpoints were trained: on a JPEG copy of
# CIFAR-10's test set resnet20-12fca82f scores 81.0 % with them, 80.7 % with CIFAR's own.
_CIFAR = Preset(size=32, resize="none", resize_to=32, augment="pad-crop-flip")
_CIFAR_OWN = dataclasses.replace(
    _CIFAR, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)
# The scale is the public weights'. On one photograph of each of 1,000 classes they score 87.1 % by
# this rule and 76.9 % by ImageNet's mean and std. The family's own geometry (crop-square, bicubic)
# gave 86.6 %: 5 photographs fewer, too few to call one rule better.
_LITE = Preset(
    size=224,
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
    resize="short",
    resize_to=256,
)
_HALF = (0.5, 0.5, 0.5)
_SMALL = Preset(size=16, mean=_HALF, std=_HALF, resize="none", resize_to=16, augment="shift")

_MODELS: dict[str, tuple[Make, Preset]] = {
    "small": (lambda classes, size: Small(classes), _SMALL),
    "speed_cnn": (
        lambda classes, size: SpeedCnn(classes, (64, 256, 256), depth=2),
        dataclasses.replace(_CIFAR_OWN, augment="reflect-crop-alternate-near"),
    ),
    "speed_cnn_wide": (
        lambda classes, size: SpeedCnn(classes, (128, 512, 512), depth=3),
        dataclasses.replace(_CIFAR_OWN, augment="reflect-crop-alternate"),
    ),
    "resnet20": (lambda classes, size: CifarResNet(20, classes), _CIFAR),
    "resnet32": (lambda classes, size: CifarResNet(32, classes), _CIFAR),
    "resnet44": (lambda classes, size: CifarResNet(44, classes), _CIFAR),
    "resnet56": (lambda classes, size: CifarResNet(56, classes), _CIFAR),
    "resnet18_cifar": (lambda classes, size: resnet18_cifar(classes), _CIFAR_OWN),
    "resnet18": (_torchvision("resnet18"), _IMAGENET),
    "resnet34": (_torchvision("resnet34"), _IMAGENET),
    "resnet50": (_torchvision("resnet50"), _IMAGENET),
    "vgg16_bn": (_torchvision("vgg16_bn"), _IMAGENET),
    "vgg16_bn_cifar": (lambda classes, size: CifarVgg(classes), _CIFAR_OWN),
    "convnext_tiny": (
        _torchvision("convnext_tiny"),
        Preset(size=224, resize="short", resize_to=236),
    ),
    "swin_t": (
        _torchvision("swin_t"),
        Preset(size=224, resize="short", resize_to=232, interpolation="bicubic"),
    ),
    "vit_b_16": (_vit(patch=16, layers=12, heads=12, width=768, mlp=3072), _IMAGENET),
    "vit_h_14": (
        _vit(patch=14, layers=32, heads=16, width=1280, mlp=5120),
        Preset(size=224, resize="short", resize_to=224, interpolation="bicubic"),
    ),
    "vit_tiny_16": (_vit(patch=16, layers=12, heads=3, width=192, mlp=768), _IMAGENET),
    "efficientnet_lite0": (lambda classes, size: EfficientNetLite0(classes), _LITE),
}
