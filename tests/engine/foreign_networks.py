"""Networks of other authors, by their own keys, each as its published definition has it."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]


class ShortcutBlock(nn.Module):
    def __init__(self, before: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResidualFunctionBlock(nn.Module):
    def __init__(self, before: int, channels: int, stride: int):
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(before, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or before != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_function(x) + self.shortcut(x))


def stages(block: Callable[[int, int, int], nn.Module]) -> list[nn.Sequential]:
    widths = (64, 64, 128, 256, 512)
    return [
        nn.Sequential(
            block(widths[n], widths[n + 1], 1 if n == 0 else 2),
            block(*widths[n + 1 : n + 2] * 2, 1),
        )
        for n in range(4)
    ]


class ShortcutResNet(nn.Module):
    """The CIFAR ResNet-18 whose keys say shortcut and linear."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(ShortcutBlock)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class ResidualFunctionResNet(nn.Module):
    """The CIFAR-100 ResNet-18 whose keys say conv2_x and residual_function."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        )
        self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x = stages(ResidualFunctionBlock)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def timm_vit(size: int = 32, classes: int = 4) -> State:
    """A ViT-Tiny by timm's keys."""
    width, tokens = 192, (size // 16) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    for n in range(12):
        for key, rows, columns in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width),
        ):  # fmt: skip
            shapes[f"blocks.{n}.{key}.weight"] = (rows, columns)
            shapes[f"blocks.{n}.{key}.bias"] = (rows,)
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{n}.{norm}.weight"] = shapes[f"blocks.{n}.{norm}.bias"] = (width,)
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=generator) * 0.1 for k, s in shapes.items()}


def vit_logits(s: State, x: Tensor) -> Tensor:
    """The vision transformer of Dosovitskiy et al. 2021, on timm's keys, three heads."""
    x = F.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=16)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + s["pos_embed"]

    def norm(x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, (192,), s[f"{key}.weight"], s[f"{key}.bias"], 1e-6)

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, s[f"{key}.weight"], s[f"{key}.bias"])

    for n in range(12):
        qkv = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.mT / 8, -1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"blocks.{n}.attn.proj")
        wide = F.gelu(linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1"))
        x = x + linear(wide, f"blocks.{n}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def hub_vit(s: State) -> State:
    """A ViT's weights by the keys of transformers, from timm's."""
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    inside = {
        "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
    }  # fmt: skip
    out: State = {}
    for key, value in s.items():
        stem, _, kind = key.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.*)", stem)
        if key in names:
            out[names[key]] = value
        elif block is None:
            out[f"{names[stem]}.{kind}"] = value
        elif block[2] == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                path = f"vit.encoder.layer.{block[1]}.attention.attention.{part}.{kind}"
                out[path] = rows.clone()
        else:
            out[f"vit.encoder.layer.{block[1]}.{inside[block[2]]}.{kind}"] = value
    return out


def hub_resnet(s: State) -> State:
    """A ResNet-18's weights by the keys of transformers."""
    out: State = {}
    for key, value in s.items():
        block = re.fullmatch(r"layer(\d)\.(\d)\.(conv|bn|downsample\.)(\d)\.(.*)", key)
        kinds = {"conv": "convolution", "bn": "normalization"}
        if block is None:
            stem, _, kind = key.partition(".")
            plain = {"fc": "classifier.1", "conv1": "resnet.embedder.embedder.convolution"}
            out[f"{plain.get(stem, 'resnet.embedder.embedder.normalization')}.{kind}"] = value
            continue
        stage, layer, what, number, kind = block.groups()
        path = f"resnet.encoder.stages.{int(stage) - 1}.layers.{layer}"
        if what == "downsample.":
            path += f".shortcut.{('convolution', 'normalization')[int(number)]}"
        else:
            path += f".layer.{int(number) - 1}.{kinds[what]}"
        out[f"{path}.{kind}"] = value
    return out


def timm_convnext(s: State) -> State:
    """A ConvNeXt's weights by the keys of timm."""
    inside = {"0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}
    return _stages(s, "stem", "stages.{n}.downsample", "stages.{n}.blocks.{b}", inside, "gamma") | {
        f"head.{part}.{kind}": s[f"classifier.{place}.{kind}"]
        for part, place in (("norm", 0), ("fc", 2))
        for kind in ("weight", "bias")
    }


def hub_convnext(s: State) -> State:
    """A ConvNeXt's weights by the keys of transformers."""
    inside = {"0": "dwconv", "2": "layernorm", "3": "pwconv1", "5": "pwconv2"}
    base = "convnext.encoder.stages.{n}"
    out = _stages(
        s, "stem", base + ".downsampling_layer", base + ".layers.{b}", inside,
        "layer_scale_parameter",
    )  # fmt: skip
    names = {"stem.0": "patch_embeddings", "stem.1": "layernorm"}
    for old, new in names.items():
        for kind in ("weight", "bias"):
            out[f"convnext.embeddings.{new}.{kind}"] = out.pop(f"{old}.{kind}")
    for kind in ("weight", "bias"):
        out[f"convnext.layernorm.{kind}"] = s[f"classifier.0.{kind}"]
        out[f"classifier.{kind}"] = s[f"classifier.2.{kind}"]
    return out


def _stages(
    s: State, stem: str, between: str, block: str, inside: dict[str, str], scale: str
) -> State:
    out: State = {}
    for key, value in s.items():
        top, number, *rest = key.split(".")
        if top != "features":
            continue
        n = int(number) // 2
        if number == "0":
            out[".".join([stem, *rest])] = value
        elif int(number) % 2 == 0:
            out[".".join([between.format(n=n), *rest])] = value
        elif rest[1] == "layer_scale":
            out[f"{block.format(n=n, b=rest[0])}.{scale}"] = value.flatten()
        else:
            out[f"{block.format(n=n, b=rest[0])}.{inside[rest[2]]}.{rest[3]}"] = value
    return out


def timm_swin(s: State) -> State:
    """A Swin's weights by the keys of timm, which merges at the start of a stage."""
    return _swin(s, 0) | {f"head.fc.{kind}": s[f"head.{kind}"] for kind in ("weight", "bias")}


def authors_swin(s: State) -> State:
    """A Swin's weights by its authors' keys: merging at a stage's end, indices of 49 x 49."""
    out = _swin(s, 1) | {f"head.{kind}": s[f"head.{kind}"] for kind in ("weight", "bias")}
    places = [key for key in out if key.endswith("relative_position_bias_table")]
    for key in places:
        index = torch.zeros(49, 49, dtype=torch.int64)
        out[key.replace("bias_table", "index")] = index
    return out | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}


def hub_swin(s: State) -> State:
    """A Swin's weights by the keys of transformers."""
    inside = {
        "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
    }  # fmt: skip
    out: State = {}
    for key, value in _swin(s, 1).items():
        stem, _, kind = key.rpartition(".")
        block = re.fullmatch(r"(layers\.\d\.blocks\.\d)\.(.*)", stem)
        if key.startswith("patch_embed."):
            part = "patch_embeddings.projection" if ".proj." in key else "norm"
            out[f"swin.embeddings.{part}.{kind}"] = value
        elif key.startswith("norm."):
            out[f"swin.layernorm.{kind}"] = value
        elif block is None:
            out[f"swin.encoder.{key}"] = value
        elif block[2] == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"swin.encoder.{block[1]}.attention.self.{part}.{kind}"] = rows.clone()
        elif block[2] == "attn":
            out[f"swin.encoder.{block[1]}.attention.self.{kind}"] = value
        else:
            out[f"swin.encoder.{block[1]}.{inside[block[2]]}.{kind}"] = value
    return out | {f"classifier.{kind}": s[f"head.{kind}"] for kind in ("weight", "bias")}


def _swin(s: State, late: int) -> State:
    """All but the head; `late` is 1 where a stage ends with its merging."""
    out: State = {}
    for key, value in s.items():
        key = key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        top, number, *rest = key.split(".")
        if key.endswith("relative_position_index") or top == "head":
            continue
        if top != "features":
            out[key] = value
        elif number == "0":
            out[f"patch_embed.{'proj' if rest[0] == '0' else 'norm'}.{rest[1]}"] = value
        elif int(number) % 2 == 0:
            out[".".join([f"layers.{int(number) // 2 - late}.downsample", *rest])] = value
        else:
            out[".".join([f"layers.{int(number) // 2}.blocks", *rest])] = value
    return out
